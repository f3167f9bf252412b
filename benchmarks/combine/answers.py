"""What `combine` and peft's `add_weighted_adapter` answer to requests that are easily got wrong."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo.merge import combine

EXPECTED_ERRORS = (ValueError, RuntimeError, NotImplementedError)
Updates = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """Two LoRAs and a combination of them.

    Attributes:
        first: Fields of the first configuration.
        second: Fields of the second configuration.
        ours: Options of `combine`.
        peers: Options of `add_weighted_adapter`.
        weights: The weights.
        count: Number of adapters that are combined.
        name: Name of peft's result.
        rank: Rank of the best approximation that is asked for, if any.
    """

    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Any] = field(default_factory=lambda: {"combination_type": "cat"})
    weights: tuple[float, ...] = (0.7, 0.3)
    count: int = 2
    name: str = "both"
    rank: int | None = None


RSLORA, DORA, BIAS, CONV = {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": ["c"]}
PATTERN = {"target_modules": ["a", "b"], "rank_pattern": {"b": 2}}
SVD_2 = {"combination_type": "svd", "svd_rank": 2}
REQUESTS = {
    "rsLoRAs": Request(RSLORA, RSLORA),
    "DoRAs with weights 1 and 0": Request(DORA, DORA, weights=(1.0, 0.0)),
    "`lora_bias` with weights 1 and 0": Request(BIAS, BIAS, weights=(1.0, 0.0)),
    "one weight for two adapters": Request(weights=(0.7,)),
    "one adapter at rank 2": Request(ours={"rank": 2}, peers=SVD_2, weights=(1.0,), count=1, rank=2),
    "TIES of ranks 4 and 3": Request(
        {}, {"r": 3}, {"method": "ties", "density": 0.5}, {"combination_type": "ties", "density": 0.5}
    ),
    "the same `rank_pattern`, factors added, saved and loaded": Request(
        PATTERN, PATTERN, {"method": "linear", "space": "factors"}, {"combination_type": "linear"}
    ),
    "targets as a pattern and as a list": Request({"target_modules": "a|b"}, {"target_modules": ["a", "b"]}),
    "a name that exists": Request(name="second"),
    "a Conv1d at rank 2": Request(CONV, CONV, {"rank": 2}, SVD_2, rank=2),
}


def base() -> nn.Module:
    """Two linear layers and a convolution, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(32, 24), "b": nn.Linear(32, 24), "c": nn.Conv1d(4, 6, 3)})


def layers(model: Any) -> dict[str, Any]:
    """Adapted layers by name."""
    return {name: layer for name, layer in model.base_model.model.items() if hasattr(layer, "lora_A")}


def save(folder: Path, seed: int, fields: dict[str, Any]) -> Path:
    """Saves a LoRA with random factors, magnitudes and biases."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["a"], "init_lora_weights": False, **fields}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for parameter in part.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return folder


def changes(model: Any) -> Updates:
    """Change of every layer's outputs by its active adapter, as a matrix that has a row for each probe."""
    found = {}
    for name, layer in layers(model).items():
        shape = (16, 4, 5) if name == "c" else (16, 32)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        found[name] = (layer(x) - layer.base_layer(x)).flatten(1)
    return found


def loaded(folder: Path) -> Any:
    """The model with a saved adapter."""
    return PeftModel.from_pretrained(base(), str(folder)).eval()


def by_combine(folders: list[Path], request: Request, work: Path) -> Any:
    """Combines files; the result is loaded by peft."""
    weights = list(request.weights)
    out = folders[1] if request.name == "second" else work / "out"
    combine(folders[: request.count], out, weights=weights, **request.ours)
    return loaded(out)


def by_peft(folders: list[Path], request: Request, work: Path) -> Any:
    """Combines in memory, saves and loads."""
    model = PeftModel.from_pretrained(base(), str(folders[0]), "first")
    model.load_adapter(str(folders[1]), "second")
    names = ["first", "second"][: request.count]
    model.add_weighted_adapter(names, list(request.weights), request.name, **request.peers)
    model.save_pretrained(str(work / "peft"), selected_adapters=[request.name])
    return loaded(work / "peft" / request.name)


def answer(method: Callable[..., Any], folders: list[Path], request: Request, work: Path) -> str:
    """Says what a method makes of a request: the error of its result, or what it raises."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            model = method(folders, request, work)
        except EXPECTED_ERRORS as error:
            return type(error).__name__
    if "method" in request.ours:
        return "combined"
    parts = [changes(loaded(folder)) for folder in folders[: request.count]]
    weights = [*request.weights, *[1.0] * (request.count - len(request.weights))]
    found = changes(model)
    lost = total = 0.0
    for name in found.keys() | {name for part in parts for name in part}:
        wanted = sum((w * p[name] for w, p in zip(weights, parts, strict=True) if name in p), torch.zeros(()))
        lost += float((wanted - found.get(name, torch.zeros(()))).square().sum())
        total += float(wanted.square().sum())
    ranks = {len(parameter) for layer in layers(model).values() for parameter in layer.lora_A.parameters()}
    if request.rank is not None:
        return f"rank {max(ranks)}"
    error = (lost / total) ** 0.5
    said = "after a warning" if warned else "without a warning"
    return "exact" if error < 1e-5 else f"{100 * error:.0f} % off, {said}"


def answers() -> list[dict[str, str]]:
    """Returns a row for each request."""
    rows = []
    for name, request in REQUESTS.items():
        with tempfile.TemporaryDirectory() as work, torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # peft starts new adapters at random
            folders = [save(Path(work, "first"), 1, request.first), save(Path(work, "second"), 2, request.second)]
            ours, peers = (answer(method, folders, request, Path(work)) for method in (by_combine, by_peft))
        rows.append({"request": name, "combine": ours, "peft": peers})
    return rows
