r"""Combines checkpoints that were tuned from one base model, on files, one tensor at a time.

With W_0 a tensor of the base and W_t that of checkpoint t, the differences D_t = W_t - W_0 are combined in float32, and
the sum is rounded once::

    linear                                          W_0 + sum_t w_t D_t
    ties, dare_ties, dare_linear, magnitude_prune   W_0 + combine(D_1 ... D_k), see `kernels.combining.elementwise`

Cost: of one tensor, all D_t as they are stored, and some float32 copies.

Source: task arithmetic, Ilharco et al., arXiv 2212.04089.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import peft_zoo
from peft_zoo.common.atomic import check_new_folder
from peft_zoo.common.checks import check, check_choice, check_count
from peft_zoo.common.progress import Progress, silent
from peft_zoo.common.tables import align, shorten
from peft_zoo.io.checkpoint import CONFIG, Checkpoint
from peft_zoo.io.safetensors import FLOATS, check_finite
from peft_zoo.kernels.combining.elementwise import ROWS, Blocks, Elementwise, Sign, combine_blocks
from peft_zoo.merge.base.pump import Change, Pump
from peft_zoo.merge.combining.options import module_seed
from peft_zoo.merge.combining.weights import Weights

CheckpointMethod = Literal["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"]
REPORT = "combine_report.json"


@dataclass(frozen=True)
class CheckpointOptions:
    """How checkpoints are combined.

    Attributes:
        method: `"linear"` (default): the weighted sum of the differences; or a method that combines entry by entry.
        density: Share of entries to keep, in (0, 1], for the methods by entry.
        sign: `"total"` (default) or `"frequency"`: how `"ties"` and `"dare_ties"` elect the sign of an entry.
        seed: Seed of the entries that DARE drops; default 0.
        readers: Number of tensors that are computed at a time; default 2.
        resume: Whether to use the finished files of an earlier call; default True.

    Raises:
        ValueError: If a field is invalid or does not fit the method.

    Examples:
        >>> CheckpointOptions("ties", density=0.2).density
        0.2
    """

    method: CheckpointMethod = "linear"
    density: float | None = None
    sign: Sign = "total"
    seed: int = 0
    readers: int = 2
    resume: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(CheckpointMethod))
        check_count("readers", self.readers)
        check(isinstance(self.resume, bool), "resume", self.resume, "use True or False")
        if self.method == "linear":
            check(self.density is None, "density", self.density, "method='linear' keeps all entries: omit it")
        else:
            self.entries("")

    def entries(self, key: str) -> Elementwise:
        """Returns the rule of a method by entry for a tensor."""
        check(self.density is not None, "density", self.density, f"method={self.method!r} needs a share in (0, 1]")
        seed = module_seed(self.seed, key)
        return Elementwise(self.method, self.density, self.sign, seed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CheckpointReport:
    """What `combine_checkpoints` wrote.

    Attributes:
        method: Name of the method.
        checkpoints: Folders of the tuned checkpoints.
        updates: Frobenius norm of the change of each tensor divided by that of the base's, of the tensors that this
            call computed: none in a dry run, and not those that an interrupted one has finished.
        copied: Names of tensors that are copied from the base: they are no floating-point numbers, or have no weight.
        nbytes: Size of the weights of the result in bytes.

    Examples:
        >>> print(CheckpointReport("linear", ("a", "b"), {"lm_head.weight": 0.01}, (), 4096).table())
        tensor          update
        lm_head.weight  0.0100
    """

    method: str
    checkpoints: tuple[str, ...]
    updates: Mapping[str, float]
    copied: tuple[str, ...]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "checkpoints": list(self.checkpoints), "copied": list(self.copied)}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each tensor; `limit` shows those that change most only."""
        items = list(self.updates.items())
        shown = items if limit is None else sorted(items, key=lambda item: -item[1])[:limit]
        return align([("tensor", "update"), *((shorten(key), f"{update:.4f}") for key, update in shown)])


def combine_checkpoints(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    per_module: Mapping[str, Sequence[float]] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CheckpointReport:
    """Combines checkpoints of transformers that were tuned from one base, without loading a model.

    Args:
        base: Folder of the checkpoint that all others were tuned from. The result has its tokenizer, configuration,
            dtypes and shards.
        checkpoints: Folders of the tuned checkpoints, with tensors of the same names and shapes.
        out: Folder to create. It appears complete or not at all; after a kill the same call goes on.
        weights: One number per checkpoint, negative ones too; default 1 for each.
        per_module: Other weights by patterns of module names, as for `combine`.
        dry_run: Whether to check everything and write nothing.
        progress: Wraps the loop over the files of the result, such as a progress bar; None shows nothing.
        **options: Fields of `CheckpointOptions`: `method`, `density`, `sign`, `seed`, `readers`, `resume`.

    Returns:
        How much each tensor changed; written as `combine_report.json` too.

    Raises:
        ValueError: If an argument or file is invalid, or the checkpoints do not fit each other. There is no `out` then.
        NotImplementedError: If a checkpoint is quantized.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("base", "math", "code"):
        ...         model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        ...         model.save_pretrained(f"{folder}/{name}")
        ...     tuned = [f"{folder}/math", f"{folder}/code"]
        ...     report = combine_checkpoints(f"{folder}/base", tuned, f"{folder}/both", weights=[0.5, 0.5])
        >>> len(report.updates), report.copied
        (16, ())
    """
    known = CheckpointOptions.__dataclass_fields__
    for name, value in options.items():
        check(name in known, name, value, f"use an option out of {', '.join(known)}")
    chosen = CheckpointOptions(**options)
    check(not isinstance(checkpoints, (str, Path)) and bool(checkpoints), "checkpoints", checkpoints, "give a list")
    by_module = Weights.of_count(len(checkpoints), "checkpoints", weights, per_module)
    check_new_folder(Path(out), "out")
    with ExitStack() as stack:
        source, *tuned = [stack.enter_context(Checkpoint(path)) for path in (base, *checkpoints)]
        source.other_files()  # refuses what must not be copied before anything is written
        for one in tuned:
            _check_same(source, one)
        by_module.check_patterns(sorted({_module(key) for key in source.tensors}))
        rows: dict[str, float] = {}
        changes = [
            Change({key: info}, partial(_compute, source, tuned, key, by_module.of(_module(key)), chosen, rows))
            for key, info in source.tensors.items()
            if info.dtype in FLOATS and info.numel and any(by_module.of(_module(key)))
        ]
        check(bool(changes), "weights", by_module.default, "nothing would change; use other weights")
        pump = Pump(source, changes, readers=chosen.readers)
        copied = tuple(key for key in source.tensors if key not in pump.changes)
        planned = CheckpointReport(chosen.method, tuple(map(str, checkpoints)), {}, copied, pump.nbytes)
        if dry_run:
            return planned
        state = {
            "version": peft_zoo.__version__,
            "options": {name: value for name, value in asdict(chosen).items() if name not in ("readers", "resume")},
            "weights": [by_module.default, {name: list(own) for name, own in by_module.per_module.items()}],
            "checkpoints": [one.identity() for one in tuned],
        }
        reports: list[CheckpointReport] = []

        def finish(work: Path) -> None:
            (work / CONFIG).write_bytes((source.folder / CONFIG).read_bytes())
            source.copy_others(work)
            (work / "README.md").unlink(missing_ok=True)  # it describes the base
            updates = {key: rows[key] for key in source.tensors if key in rows}
            report = CheckpointReport(chosen.method, planned.checkpoints, updates, copied, pump.nbytes)
            (work / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
            reports.append(report)

        pump.run(out, state, finish, resume=chosen.resume, progress=progress or silent)
    return reports[0]


def _module(key: str) -> str:
    """Returns the name of the module of a tensor."""
    return key.rpartition(".")[0] or key


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raises a ValueError unless a checkpoint has the tensors of the base."""
    for one in (base, tuned):
        if one.config.get("quantization_config"):
            raise NotImplementedError(f"{one.folder}: it is quantized, and differences need weights; dequantize it.")
    different = sorted(base.tensors.keys() ^ tuned.tensors.keys())
    if different:
        has, lacks = (base, tuned) if different[0] in base.tensors else (tuned, base)
        raise ValueError(
            f"{different[0]} is in {has.folder} and not in {lacks.folder}; use checkpoints tuned from one base."
        )
    for key, info in base.tensors.items():
        if tuned.tensors[key].shape != info.shape:
            shapes = f"{tuned.tensors[key].shape} in {tuned.folder} and {info.shape} in {base.folder}"
            raise ValueError(f"{key} is of shape {shapes}; use checkpoints tuned from one base.")


def _compute(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    key: str,
    weights: Sequence[float],
    options: CheckpointOptions,
    rows: dict[str, float],
) -> dict[str, Tensor]:
    """Returns one tensor of the result, and writes the size of its change into `rows`."""
    old = base.read(key)
    flat = _as_matrix(check_finite(key, old))
    others = [_as_matrix(check_finite(f"{one.folder}: {key}", one.read(key))) for one in tuned]
    if options.method == "linear":
        update = torch.zeros(flat.shape, dtype=_wide(flat))
        for weight, other in zip(weights, others, strict=True):
            for part, difference in zip(update.split(ROWS), _difference(other, flat)(), strict=True):
                part.add_(difference, alpha=weight)
    else:
        blocks = [_difference(other, flat) for other in others]
        update = combine_blocks(blocks, weights, options.entries(key), flat.shape)
    size = float(torch.linalg.vector_norm(flat, dtype=_wide(flat)))
    change = float(torch.linalg.vector_norm(update))
    rows[key] = change / size if size else math.inf if change else 0.0
    return {key: check_finite(key, update.add_(flat).to(old.dtype).view(old.shape))}


def _as_matrix(tensor: Tensor) -> Tensor:
    """Returns a tensor as a matrix of its rows."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _wide(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a tensor's differences are computed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _difference(tuned: Tensor, base: Tensor) -> Blocks:
    """Returns the blocks of rows of a difference."""

    def blocks() -> Iterator[Tensor]:
        return (a.to(_wide(base)) - b.to(_wide(base)) for a, b in zip(tuned.split(ROWS), base.split(ROWS), strict=True))

    return blocks
