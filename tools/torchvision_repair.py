"""Lets a CPU build of torch live with a torchvision wheel that was built for CUDA, in this project's own environment.

PyPI's Linux wheel of torchvision links against CUDA. On a CPU build of torch it cannot load its C++ operators, and then
`import torchvision` fails with "operator torchvision::nms does not exist"; so do timm, most of transformers, diffusers
and `import peft`, which import it. Declaring the two schemas that torchvision describes at import time is enough to
make everything work that does not call those operators. Where torchvision is healthy, or absent, nothing is changed.

`python tools/torchvision_repair.py` copies this file into the environment of that Python, with a `.pth` file that
imports it whenever Python starts; `make setup` does so. Users' installations never see it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

INSTALLED = "_peft_zoo_torchvision_repair"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
libraries: list[object] = []  # a `torch.library.Library` withdraws its declarations when it is collected


def declare_missing_ops(package: str) -> bool:
    """Declares `torchvision::nms` and `torchvision::qnms` if torchvision cannot load them.

    Args:
        package: Folder of the torchvision package.

    Returns:
        Whether the operators were missing and are declared now.
    """
    from pathlib import Path

    import torch

    for extension in Path(package).glob("_C.*"):
        try:  # torchvision's own import does the same a moment later; loading twice is harmless
            torch.ops.load_library(extension)
        except OSError:
            break
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    libraries.append(library)
    return True


class _Loader(SourceFileLoader):
    """Loads torchvision after its operators have been declared."""

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None and module.__spec__.submodule_search_locations is not None
        declare_missing_ops(module.__spec__.submodule_search_locations[0])
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds torchvision as Python would and gives it `_Loader`; knows no other module."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, None, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def watch() -> None:
    """Has torchvision's operators checked when it is imported; called when Python starts."""
    sys.meta_path.insert(0, _Finder())


def install() -> None:
    """Copies this file and a `.pth` file into the environment of the running Python."""
    import shutil
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site / f"{INSTALLED}.py")
    (site / f"{INSTALLED}.pth").write_text(f"import {INSTALLED}\n", encoding="utf-8")


if __name__ == "__main__":
    install()
elif __name__ == INSTALLED:
    watch()
