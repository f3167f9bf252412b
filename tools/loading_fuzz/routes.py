"""Every way to load an adapter or to give it to a tool, and the judgement of what it gives."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import peft_zoo
from loading_fuzz import reading, samples
from loading_fuzz.reading import Unreadable, need
from loading_fuzz.samples import ADAPTER, Sample

SECRET = b"SECRET"


@dataclass
class Prepared:
    """A sample with what its cases share; forked processes change their own copy of it.

    Attributes:
        sample: The sample; a route changes its base model.
        pristine: Sample with a base model that no route changes.
        good: Configuration of the valid folder.
        host: Model with the valid adapter, on which `load_adapter` loads a second one; None where no route does.
    """

    sample: Sample
    pristine: Sample
    good: dict[str, Any]
    host: Any = None

    @classmethod
    def of(cls, sample: Sample) -> Prepared:
        """Prepares a sample."""
        fields = {name: value for name, value in vars(sample).items() if name != "base"}
        good = json.loads((sample.folder / sample.files[0]).read_text(encoding="utf-8"))
        working = Sample(base=copy.deepcopy(sample.base), **fields)
        return cls(working, sample, good)


@dataclass(frozen=True)
class Route:
    """One way to load.

    Attributes:
        name: Name in the table.
        load: Function from a prepared sample, a folder and an unused path to whatever was loaded.
        check: Raises a `Wrong` if that differs from the independent reading of the folder.
        unchanged: Raises a `Wrong` if a refused folder left something behind.
    """

    name: str
    load: Callable[[Prepared, Path, Path], Any]
    check: Callable[[Prepared, Path, Any], None]
    unchanged: Callable[[Prepared, Path], None]


class Wrong(Exception):
    """An accepted folder gave something else than its files say, or a refused one left something behind."""


def same(one: Tensor, other: Tensor, what: str = "output") -> None:
    """Raises `Wrong` if two tensors differ by more than rounding."""
    if one.shape != other.shape:
        raise Wrong(f"{what} of another shape")
    size = other.nan_to_num(posinf=0, neginf=0).abs().max().item()
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * max(size, 1e-30), equal_nan=True):
        raise Wrong(f"{what} differs by {(one - other).abs().max().item():.2g} of {size:.2g}")


# ---- models ----


def from_pretrained(prepared: Prepared, folder: Path, _: Path) -> Any:
    """peft's own function."""
    return PeftModel.from_pretrained(prepared.sample.base, str(folder)).eval()


def second_adapter(prepared: Prepared, folder: Path, _: Path) -> Any:
    """peft's method of a model that has the valid adapter."""
    prepared.host.load_adapter(str(folder), "second")
    prepared.host.set_adapter("second")
    return prepared.host.eval()


def by_transformers(prepared: Prepared, folder: Path, _: Path) -> Any:
    """The method of transformers' models."""
    model: Any = prepared.sample.base
    model.load_adapter(str(folder))
    return model.eval()


def strict(prepared: Prepared, folder: Path, _: Path) -> Any:
    """peft-zoo's own function."""
    return peft_zoo.load_adapter(str(folder), prepared.sample.base).eval()


def quantized(prepared: Prepared, folder: Path, _: Path) -> Any:
    """A quantized model through transformers."""
    return type(prepared.sample.base).from_pretrained(str(folder)).eval()  # type: ignore[attr-defined]


def same_output(prepared: Prepared, folder: Path, model: Any) -> None:
    """Compares a loaded adapter with the reading of its folder."""
    expected = reading.reader_of(prepared.good)(folder, prepared.pristine, prepared.good)
    same(prepared.sample.run(model), prepared.sample.run(expected))


def base_unchanged(prepared: Prepared, _: Path) -> None:
    """The base model has its modules, its tensors and no adapter."""
    found, wanted = prepared.sample.base, prepared.pristine.base
    if [name for name, _ in found.named_modules()] != [name for name, _ in wanted.named_modules()]:
        raise Wrong("the base model has other modules")
    if getattr(found, "peft_config", None):
        raise Wrong("the base model has a configuration of an adapter")
    if getattr(found, "_hf_peft_config_loaded", False):
        raise Wrong("the base model says that it has an adapter")
    state = wanted.state_dict()
    if any(not torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items()):
        raise Wrong("the base model has other weights")


def host_unchanged(prepared: Prepared, _: Path) -> None:
    """The model has its first adapter, active, and no second one."""
    host = prepared.host
    if "second" in host.peft_config:
        raise Wrong("an adapter of that name exists")
    if any("second" in name.split(".") for name, _ in host.named_modules()):
        raise Wrong("layers have an adapter of that name")
    if host.active_adapters != ["default"]:
        raise Wrong(f"active adapters are {host.active_adapters}")
    expected = reading.reader_of(prepared.good)(prepared.sample.folder, prepared.pristine, prepared.good)
    same(prepared.sample.run(host), prepared.sample.run(expected))


def model_output(prepared: Prepared, folder: Path, model: Any) -> None:
    """Compares a quantized model with its dequantized weights."""
    config = reading.read_config(folder / prepared.sample.files[0])
    settings = config.get("quantization_config") or {}
    listed, ranks = settings.get("modules"), settings.get("ranks") or {}
    need(isinstance(listed, dict) and isinstance(ranks, dict), "no quantization config")
    tensors = reading.read_tensors(folder / prepared.sample.files[1])
    reading.finite({key: tensor for key, tensor in tensors.items() if _module(key) in listed})
    expected = copy.deepcopy(prepared.pristine.base)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if _module(key) in listed and not key.endswith(".weight"):  # that one only stops other loaders
            parts.setdefault(_module(key), {})[key.rpartition(".")[2]] = tensor
    need(set(parts) == set(listed), "modules and keys differ")
    own_state = expected.state_dict()  # transformers ignores further tensors, and names them in a warning
    state = {key: tensor for key, tensor in tensors.items() if key in own_state and _module(key) not in listed}
    for module, own in parts.items():
        weight = reading.dequantized(listed[module], own, prepared.pristine.base, module)
        if "initial_B" in own:
            first_B, first_A = own["initial_B"], own.get("initial_A", torch.empty(0, 0))
            need(ranks.get(module) == first_B.shape[-1] == first_A.shape[0], f"{module}: another rank")
            need((first_B.dtype, first_A.dtype) == (torch.float32,) * 2, f"{module}: another dtype")
            weight = weight + first_B @ first_A
        else:
            need(not ranks.get(module), f"{module}: no initial factors")
        state[f"{module}.weight"] = weight
    if state.keys() != own_state.keys():
        raise reading.Unjudged("transformers initializes a missing tensor of another layer, and warns")
    need(all(state[key].shape == own_state[key].shape for key in state), "shapes of another model")
    expected.load_state_dict(state)
    same(prepared.sample.run(model), prepared.sample.run(expected))


def _module(key: str) -> str:
    """Module of a tensor."""
    return key.rpartition(".")[0]


# ---- tools ----


def squeezed(prepared: Prepared, folder: Path, out: Path) -> Any:
    """Half the rank of a LoRA."""
    return peft_zoo.merge.squeeze_adapter(folder, out, rank=samples.RANK // 2) and out


def reported(prepared: Prepared, folder: Path, _: Path) -> Any:
    """Singular values of a LoRA."""
    return peft_zoo.merge.rank_report(folder, ranks=(2,))


def as_lora(prepared: Prepared, folder: Path, out: Path) -> Any:
    """A LoRA of the trained change of an LQ-LoRA."""
    peft_zoo.merge.export_lora(folder, out, verify=False)
    return out


def to_peft(prepared: Prepared, folder: Path, out: Path) -> Any:
    """A RandLoRA in peft's format."""
    from peft_zoo.randlora import to_peft

    return to_peft(folder, out)


def from_peft(prepared: Prepared, folder: Path, out: Path) -> Any:
    """A RandLoRA of peft in our format."""
    from peft_zoo.randlora import from_peft

    return from_peft(folder, out)


def updates_of(prepared: Prepared, folder: Path, base: nn.Module | None = None) -> dict[str, Tensor]:
    """ΔW by module of a folder with a LoRA."""
    base = base or prepared.pristine.base
    model = reading.lora_model(folder, Sample("", folder, ADAPTER, base, samples.logits), prepared.good, by_keys=True)
    old, new = (dict(each.named_modules()) for each in (base, model))
    return {
        name: new[name].weight.detach() - layer.weight.detach()
        for name, layer in old.items()
        if isinstance(layer, nn.Linear)
    }


def best_ranks(prepared: Prepared, folder: Path, out: Path) -> None:
    """Compares a squeezed LoRA with the best approximations of its updates."""
    base = zeros_like(prepared.pristine.base)
    before, after = (updates_of(prepared, place, base) for place in (folder, out))
    for name, update in before.items():
        u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
        rank = samples.RANK // 2
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        lost, least = (update - after[name]).double().norm(), (update - best).norm()
        if not lost <= least * 1.001 + 1e-5 * update.double().norm():
            raise Wrong(f"{name}: error {lost:.3g}, and {least:.3g} is possible")
    leaks(out)


def zeros_like(base: nn.Module) -> nn.Module:
    """Copy of a model with zeros in its linear layers, so that differences are exact."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
    return model


def right_spectrum(prepared: Prepared, folder: Path, report: Any) -> None:
    """Compares reported singular values with those of the updates."""
    tensors = reading.read_tensors(folder / ADAPTER[1])
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}  # a report of these alone
    reading.finite(factors)
    config = reading.read_config(folder / ADAPTER[0])
    reading.check_digest(config, folder / ADAPTER[1])
    updates = reading.lora_updates(config, reading.bare_keys(factors), prepared.pristine.base)
    found = {module.name: torch.tensor(module.singular_values, dtype=torch.float64) for module in report.modules}
    for name, update in updates.items():
        expected = torch.linalg.svdvals(update.double())
        if name not in found:
            raise Wrong(f"{name} is missing")
        values = torch.zeros_like(expected)
        values[: len(found[name])] = found[name][: len(expected)]
        if not torch.allclose(values, expected, rtol=1e-3, atol=1e-4 * max(1e-30, expected.max().item())):
            raise Wrong(f"{name}: singular values differ")


def trained_change(prepared: Prepared, folder: Path, out: Path) -> None:
    """Compares `export_lora` with s B A - B0 A0 of the file."""
    config = reading.read_config(folder / ADAPTER[0])
    tensors = reading.bare_keys(reading.read_tensors(folder / ADAPTER[1]))
    reading.check_digest(config, folder / ADAPTER[1])
    reading.finite(tensors)
    reading.check_fields(config, prepared.pristine.base, prepared.good)
    factors = {key: tensor for key, tensor in tensors.items() if not reading.CODES.fullmatch(key)}
    expected = reading.lora_updates(config, factors, prepared.pristine.base)
    reading.check_targets(config, set(expected), prepared.pristine.base, by_keys=True)
    for name in expected:
        first = [tensors.get(f"{name}.base_layer.{part}") for part in ("initial_B", "initial_A")]
        need(all(each is not None and each.is_floating_point() for each in first), f"{name}: no initial factors")
        try:
            expected[name] = expected[name] - first[0] @ first[1]  # type: ignore[operator]
        except RuntimeError as error:
            raise Unreadable(f"{name}: {error}") from error
    found = updates_of(prepared, out, zeros_like(prepared.pristine.base))
    for name, update in expected.items():
        same(found[name], update, name)
    leaks(out)


def converted(prepared: Prepared, folder: Path, out: Path) -> None:
    """Compares a RandLoRA before and after it changed its format."""
    config = json.loads((out / ADAPTER[0]).read_text(encoding="utf-8"))
    expected = reading.copied_model(folder, prepared.pristine, prepared.good, by_keys=True)
    found = reading.copied_model(out, prepared.pristine, {"peft_type": config["peft_type"]}, by_keys=True)
    same(prepared.sample.run(found), prepared.sample.run(expected))
    leaks(out)


def leaks(out: Path) -> None:
    """Raises `Wrong` if a written folder has the content of a file outside of the folder that was read."""
    for path in out.rglob("*"):
        if path.is_symlink() or (path.is_file() and path.stat().st_size < 1 << 20 and SECRET in path.read_bytes()):
            raise Wrong(f"{path.name} comes from outside of the folder")


def nothing_written(prepared: Prepared, out: Path) -> None:
    """A refused folder leaves no output, whole or unfinished."""
    if out.exists() or any(path.name.startswith(".unfinished") for path in out.parent.iterdir()):
        raise Wrong("something was written")


# ---- recipes ----


def run_recipe(prepared: Prepared, folder: Path, _: Path) -> Any:
    """A recipe through peft's own function."""
    return PeftModel.from_pretrained(prepared.sample.base, str(folder)).eval()


def weighted_sum(prepared: Prepared, folder: Path, model: Any) -> None:
    """Compares a recipe that merges with the weighted sum of its LoRAs."""
    config = reading.read_config(folder / ADAPTER[0])
    if config.get("method") != "merge":
        raise reading.Unjudged(f"method={config.get('method')!r:.40}")
    weights = config.get("weights") or {}
    base, total = prepared.pristine.base, dict[str, Tensor]()
    for name, source in (config.get("adapters") or {}).items():
        need(isinstance(source, str), "no path")
        weight = reading.a_number(weights.get(name, 1.0), "weights")
        own = Prepared(prepared.sample, prepared.pristine, {}, None)
        for module, update in updates_of(own, Path(source), zeros_like(base)).items():
            total[module] = total.get(module, 0) + weight * update
    same(prepared.sample.run(model), prepared.sample.run(reading.with_updates(base, total)))


# ---- the table ----

FROM_PRETRAINED = Route("PeftModel.from_pretrained", from_pretrained, same_output, base_unchanged)
LOAD_ADAPTER = Route("PeftModel.load_adapter", second_adapter, same_output, host_unchanged)
TRANSFORMERS = Route("transformers load_adapter", by_transformers, same_output, base_unchanged)
STRICT = Route("peft_zoo.load_adapter", strict, same_output, base_unchanged)
SQUEEZE = Route("squeeze_adapter", squeezed, best_ranks, nothing_written)
RANK_REPORT = Route("rank_report", reported, right_spectrum, nothing_written)
EXPORT = Route("export_lora", as_lora, trained_change, nothing_written)
TO_PEFT = Route("to_peft", to_peft, converted, nothing_written)
FROM_PEFT = Route("from_peft", from_peft, converted, nothing_written)
QUANTIZED = Route("quantized folder", quantized, model_output, nothing_written)
RECIPE = Route("recipe", run_recipe, weighted_sum, base_unchanged)


@dataclass(frozen=True)
class Pair:
    """A route and a sample that can take it."""

    route: Route
    prepared: Prepared

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.route.name}: {self.prepared.sample.name}"


def pairs(root: Path, with_recipe: bool = True) -> list[Pair]:
    """Saves every sample below `root` and returns all pairs, each after one valid load in this process."""
    plain = {sample.name: Prepared.of(sample) for sample in samples.adapters(root)}
    variants = {sample.name: Prepared.of(sample) for sample in samples.convertible(root)}
    kinds = {name: method for name, method in peft_zoo.methods().items() if name in plain}
    ours = [plain[name] for name in kinds]
    lora = plain["lora"]
    table = [(route, [*ours, lora]) for route in (FROM_PRETRAINED, LOAD_ADAPTER, TRANSFORMERS)]
    if hasattr(peft_zoo, "load_adapter"):
        table.append((STRICT, [lora, *ours]))
    table += [(SQUEEZE, [lora, plain["squeeze_lora"]]), (RANK_REPORT, [lora, plain["squeeze_lora"]])]
    table += [(EXPORT, [variants["lq_lora_kept"]]), (TO_PEFT, [plain["randlora"]])]
    table += [(FROM_PEFT, [variants["peft_randlora"]]), (QUANTIZED, [Prepared.of(samples.quantized_model(root))])]
    from loading_fuzz import single_files  # which needs what is defined here

    table += single_files.others(root, plain)
    if with_recipe:
        table.append((RECIPE, [Prepared.of(samples.recipe(root))]))
    for prepared in (*ours, lora):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = copy.deepcopy(prepared.pristine.base)
            prepared.host = PeftModel.from_pretrained(base, str(prepared.sample.folder)).eval()
    return [Pair(route, prepared) for route, all_prepared in table for prepared in all_prepared]


def control(pair: Pair) -> None:
    """Loads the valid folder and checks it, which also imports what the route needs; raises if that fails."""
    prepared = pair.prepared
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), contextlib.suppress(reading.Unjudged):
        warnings.simplefilter("ignore")
        working = Prepared.of(prepared.pristine)
        working.host = copy.deepcopy(prepared.host)
        loaded = pair.route.load(working, prepared.sample.folder, Path(scratch, "out"))
        try:
            pair.route.check(working, prepared.sample.folder, loaded)
        except (Unreadable, Wrong) as error:
            raise AssertionError(f"{pair.name}: the valid folder is judged wrong: {error}") from error
