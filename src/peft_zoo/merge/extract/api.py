r"""Extracts a LoRA from a checkpoint and the one that it was trained from.

    D = W_tuned - W_base ~ B A = U_r S_r V_r^T        in float32, one tensor at a time

Files of 16 bits leave rounding noise in D, which no rank below the full one holds and which is not worth a rank, see
`peft_zoo.merge.extract.noise`: by default each module gets the rank of what is above it. Tensors with equal bits are
left out. What no LoRA holds is saved whole: norms and other modules in `modules_to_save`, biases of adapted layers with
`bias="lora_only"`.

Cost: one tensor of both checkpoints and its difference in memory, and the new factors; sides above 512 are decomposed
by `peft_zoo.kernels.low_rank.certified` in some products with thin blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peft_zoo.common.atomic import check_new_folder, new_folder
from peft_zoo.common.checks import check, make_options
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.expert_names import check_plain_names, is_expert
from peft_zoo.io.safetensors import check_finite
from peft_zoo.kernels.low_rank.certified import CertifiedSvd, certified_svd
from peft_zoo.kernels.low_rank.factored import factored_svd
from peft_zoo.kernels.planning.ranks import RankTarget, Spectrum, plan_ranks
from peft_zoo.merge.base.plain_lora import PREFIX, Factors, write_plain_lora
from peft_zoo.merge.extract.differences import Difference, Differences, Pair
from peft_zoo.merge.extract.noise import Noise, rounding_noise
from peft_zoo.merge.extract.options import BUDGETS, ExtractOptions
from peft_zoo.merge.extract.report import ExtractedModule, ExtractReport

FIRST = 32  # rank with which the search for the noise begins
PLANNED = 256  # largest rank that a budget considers


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: int | str | None = None,
    skip: Sequence[str] = (),
    dtype: str = "float32",
    progress: Progress | None = None,
) -> ExtractReport:
    """Writes the difference of two checkpoints as a LoRA that stock peft loads onto the first one.

    Args:
        base: Folder of the checkpoint to start from, saved by transformers.
        tuned: Folder of the checkpoint that was trained from it, of the same architecture.
        out: Folder that does not exist or is empty; it appears complete or not at all.
        rank: Rank of every module, or `"auto"` (default if nothing else is given): that of the part above the rounding
            noise. At most one of `rank`, `energy`, `max_error` and `budget` is given.
        energy: Share of the squared singular values above the noise that every module keeps, in (0, 1].
        max_error: Largest relative error of an update in the Frobenius norm, in [0, 1).
        budget: Total of all factors: an int in parameters, or a size such as `"24MB"`.
        skip: Modules to leave out, by whole name or by its end after a dot.
        dtype: Dtype of the factors: `"float32"` (default), `"bfloat16"` or `"float16"`.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.

    Returns:
        Rank, error and noise of every module, and what is saved whole.

    Raises:
        ValueError: If an argument or file is invalid, the checkpoints are not of one model, or nothing differs. Nothing
            is written then.
        NotImplementedError: If a checkpoint is quantized, or stock peft would load a module's LoRA into another one.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo.merge import extract_lora
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/base")
        ...     model.transformer.h[0].attn.c_attn.weight.data += torch.randn(32, 2) @ torch.randn(2, 96)
        ...     model.save_pretrained(f"{folder}/tuned")
        ...     report = extract_lora(f"{folder}/base", f"{folder}/tuned", f"{folder}/lora")
        >>> [(module.name, module.rank) for module in report.modules]
        [('transformer.h.0.attn.c_attn', 2)]
    """
    given = {"rank": rank, "energy": energy, "max_error": max_error, "budget": budget, "skip": skip, "dtype": dtype}
    chosen = make_options(ExtractOptions, **given)
    target = Path(os.path.abspath(out))
    check_new_folder(target, "out")
    with Checkpoint(base) as first, Checkpoint(tuned) as second:
        pair = Pair(first, second)
        found = pair.differences()
        whole = _check(found, chosen, first, second)
        report, factors = _decompose(pair, found, chosen, progress or silent)
        with new_folder(target, "out") as folder:
            _write(folder, pair, found, factors, whole)
    saved, biases = tuple(sorted(whole)), any(name in factors for name in found.others)
    skipped = tuple(sorted(name for name in {**found.matrices, **found.others} if chosen.skips(name)))
    warnings = _warnings(report, pair, whole, chosen)
    return ExtractReport(tuple(report), saved, biases, skipped, warnings)


def extract_plan(base: str | Path, tuned: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Checks everything that `extract_lora` checks before it computes, and says what differs; writes nothing.

    Arguments and errors are those of `extract_lora`.

    Returns:
        Number of modules for a LoRA, what sets their ranks, and modules that would be saved whole.
    """
    chosen = make_options(ExtractOptions, **options)
    check_new_folder(Path(os.path.abspath(out)), "out")
    with Checkpoint(base) as first, Checkpoint(tuned) as second:
        found = Pair(first, second).differences()
        whole = _check(found, chosen, first, second)
    given = next((name for name in BUDGETS if getattr(chosen, name) is not None), "rank")
    value = chosen.resolved_rank if given == "rank" else getattr(chosen, given)
    return {"modules": len(found.matrices), "ranks": f"{given}={value}", "saved whole": sorted(whole)}


def _check(found: Differences, options: ExtractOptions, base: Checkpoint, tuned: Checkpoint) -> dict[str, list[str]]:
    """Checks what differs; returns the modules to save whole with the names of their changed tensors."""
    names = [*found.matrices, *found.others]
    if not names:
        raise ValueError(f"nothing differs between {base.folder} and {tuned.folder}; give another checkpoint.")
    for entry in options.skip:
        fits = any(name == entry or name.endswith(f".{entry}") for name in names)
        check(fits, "skip", entry, f"no module of that name differs; those that do are {', '.join(names[:4])}…")
    for name in [name for name in names if options.skips(name)]:
        found.matrices.pop(name, None)
    whole = {
        owner: parts
        for owner, parts in found.others.items()
        if not options.skips(owner) and not (owner in found.matrices and parts == ["bias"])
    }
    for owner in whole:
        found.matrices.pop(owner, None)  # a module is either adapted or saved
    check(bool(found.matrices), "skip", list(options.skip), "no matrix is left that a LoRA could hold")
    check_plain_names(found.matrices, None)
    return whole


def _decompose(
    pair: Pair, found: Differences, options: ExtractOptions, progress: Progress
) -> tuple[list[ExtractedModule], dict[str, Factors]]:
    """Finds the factors of every module; modules that are noise alone are left out."""
    ranks: Mapping[str, int] = {}
    if options.budget is not None:
        spectra = {}
        for name in progress(found.matrices, "plan"):
            delta, _ = pair.deltas(found.matrices[name])
            svd = certified_svd(delta, min(PLANNED, *delta.shape))
            values = svd.S[: min(PLANNED, len(svd.S))]
            spectra[name] = Spectrum(values, len(values), sum(delta.shape), options.torch_dtype.itemsize)
        ranks = plan_ranks(spectra, RankTarget(budget=options.budget))
    rows, factors = [], dict[str, Factors]()
    for name in progress(found.matrices, "extract"):
        row = _extract(pair, found.matrices[name], options, ranks.get(name))
        if row is not None:
            rows.append(row[0])
            factors[name] = row[1]
    check(bool(factors), "rank", options.resolved_rank, "all differences are rounding noise; pass a number")
    most = max((len(own.A) for name, own in factors.items() if is_expert(name)), default=0)
    return rows, {name: own.padded(most) if is_expert(name) else own for name, own in factors.items()}


def _extract(
    pair: Pair, one: Difference, options: ExtractOptions, planned: int | None
) -> tuple[ExtractedModule, Factors] | None:
    """Decomposes one difference; None if nothing of it is above the noise and no rank was asked for."""
    delta, tuned = pair.deltas(one)
    check_finite(one.module.name, delta)
    noise = rounding_noise(tuned)
    svd, rank = _svd(delta, noise, options, planned)
    if not rank:
        return None
    root = svd.S[:rank].sqrt()
    wide_B, wide_A = svd.U[:, :rank] * root, root[:, None] * svd.Vh[:rank]
    B, A = (check_finite(one.module.name, factor.to(options.torch_dtype)) for factor in (wide_B, wide_A))
    rounding = _distance((wide_B, wide_A), (B, A)) / svd.norm
    row = ExtractedModule(
        name=one.module.name,
        rank=rank,
        norm=svd.norm,
        error=math.hypot(svd.error(rank), rounding),
        noise=min(1.0, noise.norm / svd.norm),
        signal_rank=noise.signal_rank(svd.S),
        parameters=B.numel() + A.numel(),
    )
    return row, Factors(B, A)


def _svd(delta: Tensor, noise: Noise, options: ExtractOptions, planned: int | None) -> tuple[CertifiedSvd, int]:
    """Decomposes a difference as far as its rank needs; returns the rank too, 0 for noise alone."""
    most = min(delta.shape)
    wanted = planned if planned is not None else options.resolved_rank
    if isinstance(wanted, int):
        return certified_svd(delta, max(1, min(wanted, most))), min(wanted, most)
    if wanted == "auto":
        size = min(FIRST, most)
        while True:
            svd = certified_svd(delta, size)
            rank = noise.signal_rank(svd.S)
            if rank < len(svd.S) or len(svd.S) == most:
                return svd, rank
            size = min(4 * size, most)
    svd = certified_svd(delta, error=0.0 if (norm := float(delta.norm())) == 0 else options.error(norm, noise.norm))
    return svd, svd.rank(options.error(svd.norm, noise.norm) or 0.0) or len(svd.S)


def _distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Returns the Frobenius norm of the difference of two products of factors, without forming them."""
    B, A = torch.cat([one[0], -other[0].double()], 1), torch.cat([one[1], other[1].double()])
    return float(factored_svd(B, A, method="qr").singular_values.norm())


def _write(
    folder: Path,
    pair: Pair,
    found: Differences,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Sequence[str]],
) -> None:
    """Writes the LoRA and the tensors that are saved whole."""
    layers = dict(pair.model.named_modules())
    others: dict[str, Tensor] = {}
    for owner in whole:
        for part, _ in layers[owner].named_parameters(recurse=False):
            others[f"{PREFIX}{owner}.{part}"] = pair.read(f"{owner}.{part}", 1)
    tied = {name: source for name, source in pair.model.all_tied_weights_keys.items() if f"{PREFIX}{source}" in others}
    for name, source in tied.items():  # peft saves tied embeddings twice
        others[f"{PREFIX}{name}"] = others[f"{PREFIX}{source}"]
    has_biases = any(owner in factors for owner in found.others)
    if has_biases:  # peft saves those of all adapted layers
        for name in factors:
            if getattr(layers.get(name), "bias", None) is not None:
                others[f"{PREFIX}{name}.base_layer.bias"] = pair.read(f"{name}.bias", 1)
    modules = {name: one.module for name, one in found.matrices.items()}
    fields = {
        "bias": "lora_only" if has_biases else "none",
        "modules_to_save": sorted(whole) or None,
        "ensure_weight_tying": bool(tied),
        "base_model_name_or_path": str(pair.base.folder),
    }
    conv1d = all(isinstance(layers.get(name), Conv1D) for name in factors)
    write_plain_lora(folder, {}, modules, factors, conv1d, others, **fields)


def _warnings(
    rows: Sequence[ExtractedModule], pair: Pair, whole: Mapping[str, Sequence[str]], options: ExtractOptions
) -> tuple[str, ...]:
    """Returns what a user of the LoRA should know."""
    found = []
    noisy = [row.name for row in rows if row.rank > row.signal_rank]
    if noisy and options.resolved_rank != "auto":
        found.append(f"{noisy[0]} and {len(noisy) - 1} more: the rank also holds rounding noise; rank='auto' does not.")
    grown = [name for name in whole if any(_resized(pair, name, part) for part in whole[name])]
    if grown:
        found.append(f"{', '.join(grown)}: of another size than in the base; resize its embeddings before loading.")
    return tuple(found)


def _resized(pair: Pair, owner: str, part: str) -> bool:
    """Whether a tensor has another shape in the tuned checkpoint."""
    name = f"{owner}.{part}"
    groups = [places.group(name) for places in pair.places]
    shapes = [
        source.tensors[group.keys[0]].shape for source, group in zip((pair.base, pair.tuned), groups, strict=True)
    ]
    return shapes[0] != shapes[1]
