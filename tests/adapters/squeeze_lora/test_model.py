"""LoRA-Squeeze in training loops and in Trainer: schedules, resumed runs, and the plain LoRA at the end."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peft_zoo
from peft_zoo import SqueezeLoraConfig
from peft_zoo.adapters.squeeze_lora.factors import lora_pairs
from peft_zoo.merge import squeeze_model
from peft_zoo.squeeze_lora import (
    LoraSqueezer,
    RefactorizeCallback,
    SqueezeCallback,
    SqueezeConfig,
    finalize_squeeze,
)
from tests.adapters.squeeze_lora.samples import TARGETS, TOKENS, adamw, adapted, base, train, twin, updates

STAGES = {"num_stages": 2, "min_stage_steps": 1}


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a model card takes longer than these tests."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


class TestInALoop:
    @pytest.mark.parametrize(
        ("mode", "target"),
        [
            ("mask", {"target_rank": 2}),
            ("shrink", {"target_rank": 2}),
            ("mask", {"budget": "1KB"}),
            ("shrink", {"budget": 200}),
        ],
    )
    def test_the_target_is_reached_and_a_plain_lora_is_left(
        self, mode: str, target: dict[str, Any], tmp_path: Path
    ) -> None:
        model = adapted(mode=mode, use_rslora=True, **target, **STAGES)
        parameters = [id(p) for p in model.parameters()]
        optimizer = adamw(model)
        squeezer = LoraSqueezer(model, 40)
        assert list(squeezer.stages) == [15, 30]
        losses = train(model, 40, squeezer, optimizer)
        assert losses[-1] < losses[30] < losses[0], "training goes on after a squeeze"
        assert [id(p) for p in model.parameters()] == parameters
        for pair in squeezer.pairs:
            assert pair.size == (8 if mode == "mask" else pair.rank)
            for parameter in (pair.A, pair.B):
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        if "target_rank" in target:
            assert set(squeezer.ranks.values()) == {2}
        else:
            spent = sum(pair.rank * pair.parameters for pair in squeezer.pairs)
            assert spent <= 250 and (target["budget"] == "1KB" or spent <= 200)
            assert len(set(squeezer.ranks.values())) > 1

        model.eval()
        before, ranks = model(TOKENS), squeezer.ranks
        assert squeezer.finalize() == ranks
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6)
        assert type(model.peft_config["default"]) is LoraConfig
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=0, atol=0)
        assert {pair.name: pair.size for pair in lora_pairs(loaded, "default")} == ranks

    def test_every_module_keeps_its_energy(self) -> None:
        model = adapted(energy=0.9)
        squeezer = LoraSqueezer(model, 20)
        train(model, 14, squeezer)
        before = updates(model)
        assert squeezer.ranks == dict.fromkeys(TARGETS, 8)
        squeezer.step(15)
        for name, update in updates(model).items():
            kept = update.square().sum() / before[name].square().sum()
            assert 0.9 <= kept.item() < 1
        ranks = squeezer.ranks
        assert squeezer.finalize() == ranks, "what was squeezed to an energy is not squeezed again"

    def test_the_optimizer_can_go_on_after_the_end(self) -> None:
        model = adapted(target_rank=2, **STAGES)
        optimizer = adamw(model)
        squeezer = LoraSqueezer(model, 8)
        train(model, 8, squeezer, optimizer)
        squeezer.finalize(optimizer)
        losses = train(model, 10, optimizer=optimizer)
        assert losses[-1] < losses[0]

    def test_finalize_reaches_a_target_that_training_did_not(self) -> None:
        model = adapted(target_rank=2, num_stages=1, min_stage_steps=1)
        squeezer = LoraSqueezer(model, 100)
        train(model, 10)
        assert squeezer.finalize() == dict.fromkeys(TARGETS, 2)

    def test_the_energy_kept_is_the_best_possible(self) -> None:
        model = adapted(LoraConfig, init_lora_weights=False)
        before = updates(model)
        LoraSqueezer(model, 10, SqueezeConfig(target_rank=3, num_stages=1, min_stage_steps=1)).step(8)
        for name, update in updates(model).items():
            optimum = torch.linalg.svdvals(before[name])[3:].norm()
            assert (update - before[name]).norm().item() == pytest.approx(optimum.item(), rel=1e-5)

    @pytest.mark.parametrize("scaling", ["keep", "fold"])
    def test_scales_are_kept_or_folded(self, scaling: str) -> None:
        model = adapted(lora_alpha=24, use_rslora=True, scaling=scaling, budget=200, **STAGES).eval()
        squeezer = LoraSqueezer(model, 40)
        train(model, 40, squeezer)
        before = model(TOKENS)
        squeezer.finalize()
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6)
        config = model.peft_config["default"]
        assert not config.use_rslora
        for pair in lora_pairs(model, "default"):
            assert pair.scale == pytest.approx(1.0 if scaling == "fold" else 24 / 8**0.5)
        if scaling == "fold":
            assert config.lora_alpha == config.r and config.alpha_pattern == config.rank_pattern

    def test_other_adapters_are_left_alone(self) -> None:
        model = adapted(target_rank=2, **STAGES)
        model.add_adapter("other", SqueezeLoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False))
        before = {key: value.clone() for key, value in model.state_dict().items() if ".other" in key}
        squeezer = LoraSqueezer(model, 10)
        train(model, 10, squeezer)
        squeezer.finalize()
        after = {key: value for key, value in model.state_dict().items() if ".other" in key}
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert {pair.size for pair in lora_pairs(model, "other")} == {8}

    def test_a_compiled_model_is_not_compiled_again(self) -> None:
        model = adapted(target_rank=2, target_modules=["lin"], **STAGES)
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        optimizer, squeezer = adamw(model), LoraSqueezer(compiled, 8)
        train(compiled, 2, squeezer, optimizer)
        frames = counter.frame_count
        train(compiled, 8, squeezer, optimizer)
        assert counter.frame_count == frames > 0
        assert squeezer.ranks == {"lin": 2}
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6)

    def test_an_optimizer_that_cannot_follow_is_named_once(self) -> None:
        model = adapted(target_rank=2, **STAGES)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        squeezer = LoraSqueezer(model, 8)
        with pytest.warns(UserWarning, match="SGD") as caught:
            train(model, 8, squeezer, optimizer)
        assert len(caught) == 1

    def test_it_is_reproducible(self) -> None:
        states = []
        for _ in range(2):
            model = adapted(target_rank=2, **STAGES)
            train(model, 8, LoraSqueezer(model, 8))
            states.append(model.state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())

    def test_a_plain_lora_needs_a_schedule(self) -> None:
        with pytest.raises(ValueError, match="adapter 'default' has a LoraConfig"):
            LoraSqueezer(adapted(LoraConfig), 10)

    def test_an_unknown_scaling_is_refused(self) -> None:
        with pytest.raises(ValueError, match="scaling='half'"):
            finalize_squeeze(adapted(), scaling="half")


def toy(rank: int, config: SqueezeConfig | None, seed: int, steps: int = 100, rate: float = 5e-3) -> float:
    """Relative squared error of a LoRA that learns a change of slowly falling spectrum in few steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    change = torch.linalg.qr(normal(48, 32)).Q * 0.8 ** torch.arange(32) @ torch.linalg.qr(normal(64, 32)).Q.T
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    squeezer = None if config is None else LoraSqueezer(model, steps, config)
    optimizer = adamw(model, lr=rate)
    start = model.base_model.model[0].get_base_layer()

    def error(x: Tensor) -> Tensor:
        return (model(x) - start(x) - x @ change.T).square().mean() / (x @ change.T).square().mean()

    for step in range(1, steps + 1):
        error(normal(32, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if squeezer is not None:
            squeezer.step(step, optimizer)
    return error(normal(512, 64)).item()


def test_in_squeeze_is_at_least_as_good_as_training_at_the_low_rank() -> None:
    gradual = SqueezeConfig(target_rank=4, num_stages=3, min_stage_steps=1)
    seeds = range(3)
    assert sum(toy(32, gradual, seed) for seed in seeds) <= sum(toy(4, None, seed) for seed in seeds)


# In Trainer


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tokens that are their own labels."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(index % 6))
        return {"input_ids": row, "labels": row.clone()}


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2))


class Note(transformers.TrainerCallback):
    """Notes ranks and learning rate of each step, and stops early if it is told to."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.ranks, self.rates = stop, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {pair.rank for pair in lora_pairs(kwargs["model"], "default")}
        self.ranks.append(found.pop() if len(found) == 1 else found)
        control.should_training_stop |= state.global_step == self.stop


SCHEDULE = {"target_rank": 8, "num_stages": 3, "min_stage_steps": 1}


def trainer(
    folder: Path, callback: transformers.TrainerCallback, stop: int | None = None, plain: bool = False, **changes: Any
) -> tuple[Trainer, Note]:
    config_cls = LoraConfig if plain else SqueezeLoraConfig
    fields = {} if plain else {**SCHEDULE, **{k: changes.pop(k) for k in list(changes) if k in ("mode", "finalize")}}
    model = get_peft_model(llama(), config_cls(r=64, target_modules=["q_proj", "down_proj"], **fields))
    note = Note(stop)
    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "linear",
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**options, **changes})
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback, note]), note


class TestConfigurations:
    """A configuration object is the user's: squeezing changes the model's copy."""

    @pytest.mark.parametrize("config_cls", [LoraConfig, SqueezeLoraConfig])
    def test_one_object_serves_two_models_as_two_objects_do(self, config_cls: type[LoraConfig], tmp_path: Path) -> None:
        schedule = {"target_rank": 2, "mode": "shrink", **STAGES}
        squeeze = None if config_cls is SqueezeLoraConfig else SqueezeConfig(**schedule)
        config = config_cls(r=8, target_modules=list(TARGETS), **(schedule if squeeze is None else {}))
        trained(config, squeeze).save_pretrained(tmp_path)
        before = copy.deepcopy(config.to_dict())
        again, fresh = trained(config, squeeze), trained(copy.deepcopy(config), squeeze)
        assert config.to_dict() == before and (config.r, config.rank_pattern) == (8, {})
        assert again.peft_config["default"].r == fresh.peft_config["default"].r == 2
        for (name, one), (_, other) in zip(again.state_dict().items(), fresh.state_dict().items(), strict=True):
            assert torch.equal(one, other), name

    def test_squeezing_a_model_and_resuming_change_a_copy(self, tmp_path: Path) -> None:
        config = LoraConfig(r=8, target_modules=list(TARGETS), init_lora_weights=False)
        model, other = get_peft_model(base(), config), get_peft_model(base(), copy.deepcopy(config))
        before = copy.deepcopy(vars(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random factors lose much
            squeeze_model(model, rank=3)
        other.peft_config["default"], squeezed = config, model.peft_config["default"]
        model.save_pretrained(tmp_path)
        SqueezeCallback.prepare_resume(other, tmp_path)
        assert vars(config) == before and squeezed.r == other.peft_config["default"].r == 3


def trained(config: LoraConfig, squeeze: SqueezeConfig | None) -> PeftModel:
    """A model after four steps of a schedule."""
    torch.manual_seed(3)
    model = get_peft_model(base(), config)
    train(model, 4, LoraSqueezer(model, 4, squeeze))
    return model


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
VISITED = [64, 32, 32, 16, 16, 8, 8, 8]  # after steps 2, 4 and 6 of 8


@pytest.mark.parametrize(("mode", "plain"), [("mask", False), ("shrink", True)])
def test_trainer_visits_the_ranks_and_saves_a_plain_lora(mode: str, plain: bool, tmp_path: Path) -> None:
    callback = SqueezeCallback(SqueezeConfig(mode=mode, **SCHEDULE)) if plain else SqueezeCallback()
    run, note = trainer(tmp_path, callback, plain=plain, **({} if plain else {"mode": mode}))
    run.train()
    assert note.ranks == VISITED
    assert losses(run)[-1] < losses(run)[0]
    run.save_model(str(tmp_path / "final"))
    config = PeftConfig.from_pretrained(str(tmp_path / "final"))
    assert type(config) is LoraConfig
    assert (config.r, config.rank_pattern) == (8, {})
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "final")).eval()
    batch = torch.stack([Rows()[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).logits, run.model.eval()(batch).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["mask", "shrink"])
def test_an_interrupted_run_takes_up_ranks_and_losses(mode: str, tmp_path: Path) -> None:
    whole, note = trainer(tmp_path / "whole", SqueezeCallback(), mode=mode)
    whole.train()
    trainer(tmp_path / "part", SqueezeCallback(), stop=3, mode=mode, **SAVING)[0].train()
    resumed, later = trainer(tmp_path / "part", SqueezeCallback(), mode=mode)
    checkpoint = tmp_path / "part" / "checkpoint-3"
    if mode == "shrink":
        SqueezeCallback.prepare_resume(resumed.model, checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert note.ranks == VISITED and later.ranks == VISITED[3:]
    assert losses(resumed) == losses(whole)
    for (name, one), (_, other) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_callback_states_can_be_restored_from_the_checkpoint(tmp_path: Path) -> None:
    callback = SqueezeCallback(SqueezeConfig(**SCHEDULE))
    trainer(tmp_path, callback, stop=3, plain=True, **SAVING)[0].train()
    other = SqueezeCallback(SqueezeConfig(target_rank=1, num_stages=1, min_stage_steps=1))
    resumed, note = trainer(tmp_path, other, plain=True, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # Trainer puts restored callbacks last, so the note is taken before each squeeze.
    assert note.ranks == VISITED[2:-1]


def test_the_learning_rate_rises_again_and_the_scheduler_keeps_its_own(tmp_path: Path) -> None:
    config = SqueezeConfig(target_rank=8, num_stages=1, end_ratio=0.5, min_stage_steps=1, rewarmup_steps=2)
    run, note = trainer(tmp_path, SqueezeCallback(config), plain=True)
    run.train()
    plain = [0.01 * (1 - step / 8) for step in range(8)]
    seen = note.rates  # noted after the callback has acted
    assert seen[:4] == pytest.approx(plain[:4])
    assert seen[4:] == pytest.approx([plain[4] / 3, plain[5] * 2 / 3, plain[6], plain[7]])


def drive(callback: transformers.TrainerCallback, model: nn.Module, steps: int = 8, **arguments: Any) -> None:
    """Calls a callback as Trainer does, without the cost of a Trainer."""
    args = SimpleNamespace(**{"load_best_model_at_end": False, **arguments})
    state = SimpleNamespace(global_step=0, max_steps=steps, stateful_callbacks={})
    given: dict[str, Any] = {"model": model, "optimizer": adamw(model)}
    callback.on_train_begin(args, state, None, **given)
    for _ in range(steps):
        train(model, 1, optimizer=given["optimizer"])
        state.global_step += 1
        callback.on_step_end(args, state, None, **given)
    callback.on_train_end(args, state, None, **given)


def test_what_does_not_fit_stops_before_the_first_step() -> None:
    short = SqueezeCallback(SqueezeConfig(target_rank=2, num_stages=3))
    for callback, arguments, message in (
        (short, {}, "3 stages but only 6 steps"),
        (SqueezeCallback(), {"load_best_model_at_end": True}, r"load_best_model_at_end=True; .*mode='mask'"),
    ):
        model = adapted(target_rank=2, mode="shrink", **STAGES)
        with pytest.raises(ValueError, match=message):
            drive(callback, model, **arguments)
        assert all(update.abs().max() == 0 for update in updates(model).values())


def test_mask_compresses_the_best_model_too(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_total_limit": 1,
        **SAVING,
    }
    run, _ = trainer(tmp_path, SqueezeCallback(), **options)
    run.train()
    assert {pair.size for pair in lora_pairs(run.model, "default")} == {8}


def test_without_finalize_the_tensors_keep_their_size() -> None:
    model = adapted(target_rank=2, finalize=False, **STAGES)
    drive(SqueezeCallback(), model)
    assert {(pair.size, pair.rank) for pair in lora_pairs(model, "default")} == {(8, 2)}
    assert isinstance(model.peft_config["default"], SqueezeLoraConfig)
    finalize_squeeze(model)
    assert {pair.size for pair in lora_pairs(model, "default")} == {2}


@pytest.mark.parametrize(
    ("config_cls", "how"),
    [(SqueezeLoraConfig, "in place"), (LoraConfig, "in place"), (LoraConfig, "as another adapter")],
)
def test_the_plain_lora_names_its_modules(config_cls: type[LoraConfig], how: str, tmp_path: Path) -> None:
    """An expression of a file is run by nobody; a lin that has no adapter is excluded by name."""
    fields = {"target_modules": r"(emb|layers\.1\.lin)", "rank_pattern": {"e.b": 6}, "init_lora_weights": False}
    torch.manual_seed(0)
    plain = nn.ModuleDict({"emb": nn.Embedding(20, 8), "lin": nn.Linear(8, 8)})
    plain["layers"] = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))
    model = get_peft_model(copy.deepcopy(plain), config_cls(r=4, **fields))
    wanted, name = updates(model), "default"
    if how == "in place":
        finalize_squeeze(model)
    else:
        squeeze_model(model, rank=5, into=(name := "small"))
        wanted = updates(model, name)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    folder = tmp_path / ("" if name == "default" else name)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["emb", "layers.1.lin"] and saved["peft_type"] == "LORA"
    found = updates(peft_zoo.load_adapter(str(folder), plain))
    assert found.keys() == wanted.keys() == {"emb", "layers.1.lin"}
    for module, update in wanted.items():
        torch.testing.assert_close(found[module], update, rtol=0, atol=1e-5)


def test_without_a_target_it_is_the_lora_it_began_as() -> None:
    model = adapted()
    drive(SqueezeCallback(), model, steps=2)
    assert isinstance(model.peft_config["default"], SqueezeLoraConfig)
    assert {pair.size for pair in lora_pairs(model, "default")} == {8}


def test_factors_are_balanced_every_few_steps() -> None:
    model = adapted(LoraConfig)
    drive(RefactorizeCallback(every=8), model)
    for pair in lora_pairs(model, "default"):
        B, A = (factor.double() for factor in pair.matrices())
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-6 * (B.T @ B).max().item())
    with pytest.raises(ValueError, match="every=0"):
        RefactorizeCallback(every=0)
    with pytest.raises(ValueError, match="optimizer_state='forget'"):
        RefactorizeCallback(optimizer_state="forget")


class TestPrepareResume:
    def test_what_cannot_be_resumed_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"has no adapter_config.json"):
            SqueezeCallback.prepare_resume(adapted(), tmp_path)
        adapted(LoraConfig, r=16).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"emb has rank 8, the checkpoint 16"):
            SqueezeCallback.prepare_resume(adapted(), tmp_path)

    def test_differing_ranks_are_taken_over(self, tmp_path: Path) -> None:
        model = adapted(budget=200, mode="shrink", **STAGES)
        squeezer = LoraSqueezer(model, 4)
        train(model, 4, squeezer)
        model.save_pretrained(tmp_path)
        fresh = adapted(budget=200, mode="shrink", **STAGES)
        SqueezeCallback.prepare_resume(fresh, tmp_path)
        fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
        torch.testing.assert_close(fresh(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)
        assert {p.name: p.size for p in lora_pairs(fresh, "default")} == squeezer.ranks


class TestRegistration:
    def test_its_tensors_are_those_of_a_lora(self) -> None:
        method = peft_zoo.methods()["squeeze_lora"]
        assert issubclass(method.tuner_cls, LoraModel)
        names = {name for name, p in adapted().named_parameters() if p.requires_grad}
        assert names == {name for name, p in adapted(LoraConfig).named_parameters() if p.requires_grad}

    def test_fresh_adapters_are_those_of_a_lora(self) -> None:
        ours, pefts = adapted(lora_alpha=4), adapted(LoraConfig, lora_alpha=4)
        assert torch.equal(ours(TOKENS), pefts(TOKENS))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), pefts.parameters(), strict=True))

    def test_an_unfinished_run_saves_its_schedule(self, tmp_path: Path) -> None:
        model = adapted(target_rank=2, **STAGES)
        squeezer = LoraSqueezer(model, 8)
        train(model, 4, squeezer)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
        assert isinstance(loaded.peft_config["default"], SqueezeLoraConfig)
        again = LoraSqueezer(loaded, 8, start=8)
        assert again.stages == squeezer.stages and again.ranks == squeezer.ranks
        assert torch.equal(twin(loaded).eval()(TOKENS), model.eval()(TOKENS))
