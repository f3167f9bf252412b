"""Combining files: stock peft loads the result and computes the combination, on every kind of layer and format."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo.merge import analyze, combine
from peft_zoo.merge.combining import api
from peft_zoo.merge.combining.modules import combine_updates
from peft_zoo.merge.combining.options import CombineOptions
from tests.merge.samples import ALL, adapted, config, content, kohya, layers, loaded, saved, single, train, updates

# Float32 factors: their products have the precision of float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"linear": 4, "conv2": 8}, "alpha_pattern": {"linear": 3, "words": 10}},
    "fewer": {"target_modules": ["linear", "conv2"], "r": 3, "lora_alpha": 5},
    "negative": {"lora_alpha": -9},
}


def made(folder: Path, seed: int, **fields: Any) -> Path:
    """A saved LoRA with factors of its own."""
    model = adapted(**fields)
    train(model, seed=seed)
    return saved(folder, model)


@torch.no_grad()
def deltas(folder: Path) -> dict[str, Tensor]:
    """Updates of all modules as stock peft computes them."""
    return {
        name: layer.get_delta_weight("default").double()  # type: ignore[operator]
        for name, layer in layers(loaded(folder)).items()
    }


def expected(one: Path, other: Path, weights: tuple[float, float]) -> dict[str, Tensor]:
    first, second = deltas(one), deltas(other)
    return {
        name: weights[0] * first.get(name, torch.zeros(())) + weights[1] * second.get(name, torch.zeros(()))
        for name in first | second
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_cat_is_the_sum_of_the_updates(kind: str, tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, **OTHERS[kind])
    report = combine([one, other], tmp_path / "out", weights=[0.7, -0.3])
    found, wanted = deltas(tmp_path / "out"), expected(one, other, (0.7, -0.3))
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, **CLOSE)
    written = config(tmp_path / "out")
    ranks = {module.name: sum(module.ranks) for module in report.modules}
    largest = {"words": 12, "linear": 10, "conv1": 8, "conv2": 8, "conv3": 6}  # ranks of any matrix of this size
    assert {m.name: m.rank for m in report.modules} == {n: min(r, largest[n]) for n, r in ranks.items()}
    assert written["lora_alpha"] == written["r"] and written["use_rslora"] is False
    assert report.error < 1e-6


def test_a_lower_rank_is_the_best_one(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, use_rslora=True, r=4)
    report = combine([one, other], tmp_path / "out", weights=[1, 0.5], rank=3)
    found, wanted = deltas(tmp_path / "out"), expected(one, other, (1, 0.5))
    for module in report.modules:
        S = torch.linalg.svdvals(wanted[module.name].flatten(1))
        lost = (found[module.name] - wanted[module.name]).norm()
        assert float(lost) == pytest.approx(float(S[3:].norm()), rel=1e-3)
        assert module.error == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-4) and module.rank == 3


def test_one_adapter_with_a_rank_is_compressed(tmp_path: Path) -> None:
    report = combine([made(tmp_path / "one", 5)], tmp_path / "out", rank=2)
    assert {module.rank for module in report.modules} == {2} and config(tmp_path / "out")["r"] == 2


def test_weights_of_one_and_zero_give_the_first_adapter(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6)
    combine([one, other], tmp_path / "out", weights=[1, 0])
    ours, theirs = content(tmp_path / "out")[0], content(one)[0]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key] * (2 if "lora_A" in key or "embedding_A" in key else 1))  # the scale


def peft_combination(one: Path, other: Path, kind: str, **how: Any) -> dict[str, Tensor]:
    """What peft's add_weighted_adapter computes."""
    model = loaded(one)
    model.load_adapter(str(other), "other")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore")
        model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "both", combination_type=kind, **how)
        return {name: layer.get_delta_weight("both").double() for name, layer in layers(model, "both").items()}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("linear", {"method": "linear", "space": "factors"}, {}),
        ("cat", {"method": "cat"}, {}),
        ("svd", {"method": "linear", "rank": 4}, {"svd_rank": 4}),
        ("ties", {"method": "ties", "space": "factors", "density": 0.4}, {"density": 0.4}),
        ("magnitude_prune", {"method": "magnitude_prune", "space": "factors", "density": 0.4}, {"density": 0.4}),
        ("ties_svd", {"method": "ties", "space": "delta", "density": 0.4, "rank": 4}, {"density": 0.4, "svd_rank": 4}),
        (
            "magnitude_prune_svd",
            {"method": "magnitude_prune", "space": "delta", "density": 0.4, "rank": 4},
            {"density": 0.4, "svd_rank": 4},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_gives_the_same_where_it_is_right(
    kind: str, ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path
) -> None:
    """For linear layers; peft cannot combine some of the others by every method."""
    one, other = (made(tmp_path / n, s, target_modules=["linear"], r=4) for n, s in (("one", 5), ("other", 6)))
    combine([one, other], tmp_path / "out", weights=[0.7, -0.3], **ours)
    found, wanted = deltas(tmp_path / "out"), peft_combination(one, other, kind, **theirs)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, **CLOSE)


def test_peft_is_wrong_with_rslora_and_this_is_not(tmp_path: Path) -> None:
    fields = {"target_modules": ["linear"], "r": 4, "use_rslora": True}
    one, other = (made(tmp_path / n, s, **fields) for n, s in (("one", 5), ("other", 6)))
    combine([one, other], tmp_path / "out", weights=[0.7, -0.3])
    wanted = expected(one, other, (0.7, -0.3))["linear"]
    torch.testing.assert_close(deltas(tmp_path / "out")["linear"], wanted, **CLOSE)
    theirs = peft_combination(one, other, "cat")["linear"]
    assert float((theirs - wanted).norm() / wanted.norm()) > 1


@pytest.mark.parametrize(
    "how",
    [
        {"method": "ties", "density": 0.5},
        {"method": "ties", "density": 0.5, "space": "knots"},
        {"method": "ties", "density": 0.5, "rank": 3, "compress_first": True},
        {"method": "dare_ties", "density": 0.5, "seed": 3},
        {"method": "dare_linear", "density": 0.5, "space": "delta", "rank": 4},
        {"method": "magnitude_prune", "density": 0.5},
        {"method": "slerp", "weights": [0.4, 0.6]},
        {"method": "slerp", "weights": [0.4, 0.6], "global_angle": True},
        {"method": "orthogonal"},
        {"method": "tsv", "rank": 4},
        {"method": "iso"},
    ],
    ids=lambda how: " ".join(str(how[key]) for key in how if key != "weights"),
)
def test_every_method_writes_what_stock_peft_loads(how: dict[str, Any], tmp_path: Path) -> None:
    """Adapters of other ranks and targets; equal calls give equal bytes."""
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, **OTHERS["fewer"])
    report = combine([one, other], tmp_path / "out", **how)
    again = combine([one, other], tmp_path / "again", **how)
    assert deltas(tmp_path / "out").keys() == deltas(one).keys()
    assert report == again
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    sizes = {name: float(update.norm()) for name, update in deltas(tmp_path / "out").items()}
    if not report.error > 1e-3:  # nothing was cut off
        assert sizes == pytest.approx({module.name: module.norm for module in report.modules}, rel=1e-3)
    if how.get("rank"):
        assert max(module.rank for module in report.modules) <= how["rank"]


def test_weights_by_module(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6)
    report = combine([one, other], tmp_path / "out", per_module={"conv*": [0, 0], "linear": [0, 2]})
    found = deltas(tmp_path / "out")
    assert found.keys() == {"words", "linear"} == {module.name for module in report.modules}
    torch.testing.assert_close(found["linear"], 2 * deltas(other)["linear"], **CLOSE)
    torch.testing.assert_close(found["words"], deltas(one)["words"] + deltas(other)["words"], **CLOSE)


def test_files_of_sd_scripts(tmp_path: Path) -> None:
    """Their scale is alpha / rank; the result needs none."""
    alpha = {"lora_unet_to_q.alpha": torch.tensor(2.0)}
    metadata = {"ss_network_dim": "4", "ss_base_model_version": "sd_v1"}
    one = single(tmp_path / "one.safetensors", {**kohya(), **alpha}, metadata)
    other = single(tmp_path / "other.safetensors", kohya(rank=3))
    report = combine([one, other], tmp_path / "out.safetensors", weights=[1, 0.5])
    tensors, texts = content(tmp_path / "out.safetensors")
    scale = {"lora_unet_to_q": 0.5}
    first, second = updates(kohya(), lambda name: scale.get(name, 1.0)), updates(kohya(rank=3), lambda _: 0.5)
    for name, update in updates(tensors, lambda _: 1.0).items():
        torch.testing.assert_close(update, first[name] + second[name], **CLOSE)
    assert texts == {"format": "pt", "ss_base_model_version": "sd_v1"} and not any("alpha" in key for key in tensors)
    assert tensors["lora_unet_conv.lora_up.weight"].shape[2:] == (1, 1)
    assert {module.name: module.rank for module in report.modules if module.rank == 7} == {
        "lora_unet_to_q": 7,
        "lora_te_q_proj": 7,
    }


def test_dtypes(tmp_path: Path) -> None:
    model = adapted()
    model.to(torch.bfloat16)
    one = saved(tmp_path / "one", model)
    for dtype, found in (("adapter", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        report = combine([one, one], tmp_path / dtype, weights=[0.3, 0.4], dtype=dtype)
        assert {tensor.dtype for tensor in content(tmp_path / dtype)[0].values()} == {found}
        assert (report.error > 1e-4) is (dtype != "float32")  # rounding is reported


def test_experts_get_one_rank(tmp_path: Path) -> None:
    """peft stacks the factors of all experts."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8)}) for _ in range(2))

    names = [f"experts.{index}.w1" for index in range(2)]
    for name, targets in (("one", names), ("other", names[:1])):
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        saved(tmp_path / name, get_peft_model(nn.ModuleDict({"layer": Experts()}), lora))
    report = combine([tmp_path / "one", tmp_path / "other"], tmp_path / "out")
    assert {(module.rank, module.parameters) for module in report.modules} == {(4, 64)}
    shapes = {tuple(tensor.shape) for tensor in content(tmp_path / "out")[0].values()}
    assert shapes == {(4, 8), (8, 4)} and config(tmp_path / "out")["rank_pattern"] == {}


def untrained(folder: Path, **fields: Any) -> Path:
    """A saved LoRA whose updates are zero."""
    model = adapted(**fields)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            nn.init.zeros_(parameter)
    return saved(folder, model)


@pytest.mark.parametrize(
    "how",
    [{"method": "ties", "density": 0.5, "space": space, "rank": 6} for space in ("core", "knots", "delta")]
    + [{"method": "tsv", "rank": 6}, {"method": "iso"}, {"method": "cat"}],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_an_update_of_zeros_is_none(how: dict[str, Any], tmp_path: Path) -> None:
    """It has no vote and no directions; where all are zero, there is nothing to write."""
    one, zero = made(tmp_path / "one", 5), untrained(tmp_path / "zero")
    alone = combine([one], tmp_path / "alone", **how)
    for index, pair in enumerate(([one, zero], [zero, one])):
        report = combine(pair, tmp_path / str(index), **how)
        assert [module.rank for module in report.modules] == [module.rank for module in alone.modules]
        for name, update in deltas(tmp_path / "alone").items():
            torch.testing.assert_close(deltas(tmp_path / str(index))[name], update, **CLOSE)
    with pytest.raises(ValueError, match="zero in every module"):
        combine([zero, zero], tmp_path / "none", **how)


def test_updates_that_cancel_are_reported(tmp_path: Path) -> None:
    one, linear = made(tmp_path / "one", 5), made(tmp_path / "linear", 6, target_modules=["linear"])
    with pytest.raises(ValueError, match=r"weights.*zero in every module"):
        combine([one, one], tmp_path / "out", weights=[1, -1])
    report = combine([one, one, linear], tmp_path / "out", weights=[1, -1, 1])
    assert [module.name for module in report.modules] == ["linear"] == list(deltas(tmp_path / "out"))
    assert any("4 modules" in warning for warning in report.warnings) and report.error < 1e-6
    tiny = {"method": "ties", "density": 0.001}
    with pytest.raises(ValueError, match="density"):
        combine([one], tmp_path / "tiny", **tiny)


def test_dare_drops_other_entries_of_each_module(tmp_path: Path) -> None:
    model = get_peft_model(
        nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b")}), LoraConfig(r=4, target_modules=["a", "b"])
    )
    for layer in layers(model).values():
        nn.init.eye_(layer.lora_A["default"].weight)  # type: ignore[arg-type, index, union-attr]
        nn.init.ones_(layer.lora_B["default"].weight)  # type: ignore[arg-type, index, union-attr]
    how = {"method": "dare_linear", "density": 0.5, "space": "delta", "rank": 8}
    combine([saved(tmp_path / "one", model)], tmp_path / "out", **how)
    model = PeftModel.from_pretrained(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("a", "b")}), tmp_path / "out")
    one, other = (layer.get_delta_weight("default") > 1 for layer in layers(model).values())  # type: ignore[operator]
    assert not torch.equal(one, other) and 0 < int(one.sum()) < 32 > int(other.sum()) > 0


def test_one_module_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def remembered(*args: Any) -> Any:
        nonlocal most
        most = max(most, sum(tensor() is not None for tensor in alive))
        found = combine_updates(*args)
        assert found is not None
        alive.append(weakref.ref(found[1].B))
        return found

    monkeypatch.setattr(api, "combine_updates", remembered)
    one = made(tmp_path / "one", 5)
    assert len(combine([one, one], tmp_path / "out").modules) == len(alive) == 5 and most == 0


def test_similarity(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, **OTHERS["fewer"])
    report = analyze([one, other])
    assert {pair.module for pair in report.pairs} == {"linear", "conv2"}
    D, E = deltas(one)["linear"].flatten(), deltas(other)["linear"].flatten()
    pair = next(pair for pair in report.pairs if pair.module == "linear")
    assert pair.cosine == pytest.approx(float((D @ E) / D.norm() / E.norm()), rel=1e-4)
    assert pair.sign_conflict == pytest.approx(float((D * E < 0).double().mean()))
    assert pair.adapters == ("one", "other") and 0 < pair.overlap <= 1
    assert "linear" in report.table() and len(report.to_dict()["pairs"]) == 2


# --- bad input ---


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"weights": [1.0]}, "weights has 1 entries for 2 adapters"),
        ({"weights": [1.0, float("inf")]}, "weights"),
        ({"weights": [0.0, 0.0]}, "weights"),
        ({"method": "average"}, "method"),
        ({"method": "ties"}, "density=None"),
        ({"density": 0.5}, "density=0.5"),
        ({"method": "ties", "density": 0.5, "space": "delta"}, "rank=None"),
        ({"method": "tsv"}, "rank=None"),
        ({"space": "core"}, "space='core'"),
        ({"method": "linear", "space": "factors"}, "r=6 in 'one', r=3 in 'other'"),
        ({"method": "slerp", "weights": [1, 1]}, "weights"),
        ({"method": "cat", "compress_first": True, "rank": 2}, "compress_first"),
        ({"global_angle": True}, "global_angle"),
        ({"rank": 0}, "rank=0"),
        ({"seed": -1, "method": "dare_ties", "density": 0.5}, "seed=-1"),
        ({"drop": ["nothing"]}, "drop='nothing'"),
        ({"per_module": {"convx": [1, 1]}}, r"per_module\['convx'\]"),
        ({"ranks": 3}, "ranks=3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_write_nothing(how: dict[str, Any], named: str, tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, **OTHERS["fewer"])
    with pytest.raises(ValueError, match=named):
        combine([one, other], tmp_path / "out", **how)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector.*magnitude"),
        ({"lora_bias": True, "target_modules": ["linear"]}, "lora_B.bias.*lora_bias"),
        ({"modules_to_save": ["head"]}, "head.*modules_to_save"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_or_dropped(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", 5), made(tmp_path / "other", 6, **fields)
    with pytest.raises(ValueError, match=named):
        combine([one, other], tmp_path / "out")
    extra = named.rpartition("*")[2]
    report = combine(
        [one, other], tmp_path / "out", drop=[extra, "conv1"] if "target_modules" not in fields else [extra]
    )
    assert extra in report.dropped
    assert set(deltas(tmp_path / "out")) == set(ALL) - (set() if "target_modules" in fields else {"conv1"})


def test_adapters_of_other_models_and_formats_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path / "one", 5)
    wide = get_peft_model(nn.ModuleDict({"linear": nn.Linear(12, 11)}), LoraConfig(r=2, target_modules=["linear"]))
    other = saved(tmp_path / "other", wide)
    with pytest.raises(ValueError, match=r"linear: 'other' has a linear layer of \(11, 12\)"):
        combine([one, other], tmp_path / "out")
    file = single(tmp_path / "kohya.safetensors", kohya())
    with pytest.raises(ValueError, match=r"'one', 'kohya.safetensors'.*peft and kohya"):
        combine([one, file], tmp_path / "out")
    with pytest.raises(ValueError, match=r"out=.*\.safetensors"):
        combine([file, file], tmp_path / "out")
    with pytest.raises(ValueError, match="out="):
        combine([one, one], one)
    with pytest.raises(ValueError, match="adapters"):
        combine([], tmp_path / "out")
    with pytest.raises(ValueError, match="adapters"):
        analyze([one])


def test_options_default_to_the_core_space() -> None:
    assert CombineOptions(method="dare_ties", density=0.5).resolved_space == "core"
    assert CombineOptions().resolved_space == "delta"
