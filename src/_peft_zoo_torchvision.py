"""Lets a CPU build of torch live with a torchvision wheel that was built for CUDA.

PyPI's Linux wheel of torchvision links against CUDA. On a CPU build of torch it cannot load its C++ operators, and then
`import torchvision` fails with "operator torchvision::nms does not exist"; so do timm, most of transformers, diffusers
and `import peft`, which import it. Declaring the two schemas that torchvision describes at import time is enough to
make everything work that does not call those operators. Where torchvision is healthy, or absent, nothing is changed.
"""

# A top-level module of its own: as a part of `peft_zoo` it could only be imported after `peft_zoo/__init__.py`, that is
# after peft, which is too late.

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # a `torch.library.Library` withdraws its declarations when it is collected


def declare_missing_ops() -> bool:
    """Declares `torchvision::nms` and `torchvision::qnms` if torchvision is installed but cannot load them.

    Call it before anything imports torchvision. It does not import torchvision itself, and a second call does nothing.

    Returns:
        Whether the operators were missing and are declared now.
    """
    if "torchvision" in sys.modules:
        return False
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _loads_operators(Path(spec.origin).parent):
        return False
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return True


def _loads_operators(package: Path) -> bool:
    """Loads the operators as torchvision's own import would a moment later; loading them twice is harmless."""
    import torch

    with contextlib.suppress(OSError):
        for extension in package.glob("_C.*"):
            torch.ops.load_library(extension)
    return hasattr(torch.ops.torchvision, "nms")
