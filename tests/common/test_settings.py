from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from peft_zoo.common.settings import method_options, read_settings_file, resolve_settings, setting, written
from peft_zoo.common.values import SettingError


@dataclass(frozen=True)
class Flags:
    """Settings of every kind."""

    source: str = setting("a file", positional=True, required=True, metavar="IN")
    batch_size: int | None = setting("examples per step")
    learning_rate: float = setting("peak learning rate", 0.1)
    quick: bool = setting("less work", False)
    targets: list[str] | None = setting("names")
    options: dict[str, str] = method_options()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win_and_tables_merge_key_by_key() -> None:
    settings = resolve_settings(
        Flags,
        {"source": "a", "batch_size": 10, "options": {"r": 4, "sparsity": 0.5}},
        {"batch_size": "20", "options": {"r": 8}},
    )
    assert settings == Flags("a", 20, 0.1, options={"r": "8", "sparsity": "0.5"})


def test_a_required_value_is_named_as_the_user_writes_it() -> None:
    with pytest.raises(SettingError, match="IN is missing"):
        resolve_settings(Flags, {"batch_size": 1})
    with pytest.raises(SettingError, match="--batch-size"):
        resolve_settings(Flags, {"source": "a", "batch_size": "many"})
    assert written(Flags.__dataclass_fields__["options"]) == "--set"


def test_a_file_takes_flag_names_with_either_dash(tmp_path: Path) -> None:
    text = "batch-size: 4\nlearning_rate: 1e-3\nquick: true\ntargets: [q, v]\nset:\n  r: 16\n  bias: none\n"
    layer = read_settings_file(write(tmp_path / "run.yaml", text), Flags)
    settings = resolve_settings(Flags, {"source": "a"}, layer)
    assert settings == Flags("a", 4, 1e-3, True, ["q", "v"], {"r": "16", "bias": "none"})
    assert read_settings_file(write(tmp_path / "run.yaml", "batch-size: null"), Flags) == {}
    date = read_settings_file(write(tmp_path / "run.yaml", "batch-size: 2020-01-01"), Flags)
    with pytest.raises(SettingError, match=r"--batch-size.*2020-01-01"):
        resolve_settings(Flags, {"source": "a"}, date)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("quik: true", ["'quik'", "'quick'", "learning-rate", "set"]),
        ("source: a", ["'source'"]),
        ("- quick", ["no mapping"]),
        ("a: [", ["is not YAML"]),
        ("set: 3", ["set cannot be 3"]),
        ("a: " + "[" * 5000, ["is not YAML"]),
        ("batch-size: " + "9" * 5000, ["is not YAML"]),
        ("quick: true\nquick: false", ["'quick' twice"]),
        ("#" * (1 << 20) + "\nquick: true", ["1048576 characters"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_bad_file_is_answered_with_one_sentence(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    path = tmp_path / "run.yaml" if text is None else write(tmp_path / "run.yaml", text)
    with pytest.raises(SettingError) as caught:
        read_settings_file(path, Flags)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)
