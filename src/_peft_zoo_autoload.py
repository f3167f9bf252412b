"""Registers the zoo's types in programs that import only peft or transformers; off unless `PEFT_ZOO_AUTOLOAD=1`.

Evaluation harnesses and serving tools load adapters through peft, and quantized models through transformers, and have
no place for an `import peft_zoo`. torch calls every entry point of the group `torch.backends` at the end of
`import torch`, which every such program does. `install` then sees to it that `peft_zoo` is imported as soon as
`import peft` is done, or what imports the quantizers of transformers, which every model does.

Often it is one of these imports that imports torch. `peft` is half executed then, too late for a hook on its loader,
and a hook on one of its later submodules would run while half of peft's names are missing. So it is the module's spec
that is watched: importlib clears the spec's `_initializing` when the module is complete. Should a later Python do that
differently, nothing is registered and nothing breaks.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = ("peft", "transformers.quantizers.auto")


def install() -> None:
    """Hooks the imports if the environment asks for it. Called by torch, which would not survive an exception."""
    if os.environ.get("PEFT_ZOO_AUTOLOAD") != "1":
        return
    sys.meta_path.insert(0, _Finder())
    for name in WATCHED:
        if name in sys.modules:  # it is what imports torch right now
            _watch(getattr(sys.modules[name], "__spec__", None))


class _Finder(MetaPathFinder):
    """Meta path finder that returns the specs that the other finders find for `WATCHED`, as `_WatchedSpec`.

    It stays for the life of the process: asking whether peft exists (`importlib.util.find_spec`) does not import it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        _watch(spec)
        return spec


class _WatchedSpec(ModuleSpec):
    """Module spec that imports `peft_zoo` once its module has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            _import_peft_zoo(self.name)


def _watch(spec: ModuleSpec | None) -> None:
    if type(spec) is ModuleSpec:
        spec.__class__ = _WatchedSpec


def _initializing(name: str) -> bool:
    """Whether a module is being imported right now."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _import_peft_zoo(done: str) -> None:
    if done in WATCHED and done not in sys.modules:
        return  # its import failed
    if _initializing("peft"):
        return  # it imports transformers, and is watched itself
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and _initializing(name):  # the outermost of them comes first
            _watch(module.__spec__)  # it is half executed: what we need of it may not be there yet
            return
    try:
        importlib.import_module("peft_zoo")
    except Exception:
        # The program asked for something else and shall get it, whatever is wrong with us. Said in the log, since
        # under `-W error` a warning would raise.
        logging.getLogger("peft_zoo").warning("PEFT_ZOO_AUTOLOAD=1, but peft_zoo cannot be imported", exc_info=True)
