"""Numbers of tokens of base and adapter."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.io.header import TensorInfo
from peft_zoo.merge.checkpoint.config_changes import resized
from peft_zoo.merge.checkpoint.vocabulary import adapter_vocabulary, embedding_names, with_padding
from tests.merge.checkpoint.test_ties import llama

NAMES = {"input": "model.embed_tokens", "output": "lm_head"}
P = "base_model.model."


def info(*shape: int) -> TensorInfo:
    return TensorInfo(torch.float32, shape)


def test_names_of_embeddings() -> None:
    assert embedding_names(llama()) == NAMES
    assert embedding_names(llama().model) == {"input": "embed_tokens"}


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({}, 16),
        ({f"{P}model.embed_tokens.weight": info(19, 8), f"{P}lm_head.weight": info(19, 8)}, 19),
        ({f"{P}model.embed_tokens.base_layer.weight": info(19, 8), f"{P}lm_head.base_layer.weight": info(19, 8)}, 19),
        ({f"{P}model.embed_tokens.weight": info(12, 8)}, 12),
        ({f"{P}model.embed_tokens.lora_embedding_A": info(4, 16), f"{P}lm_head.lora_B.weight": info(16, 4)}, 16),
    ],
)
def test_the_files_tell_the_number_of_tokens(tensors: dict[str, TensorInfo], size: int) -> None:
    assert adapter_vocabulary(tensors, NAMES, 16) == size


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"{P}model.embed_tokens.weight": info(19, 8)}, "lm_head"),
        ({f"{P}model.embed_tokens.lora_embedding_A": info(4, 19)}, r"embed_tokens.*19.*16"),
        ({f"{P}lm_head.lora_B.weight": info(19, 4)}, r"lm_head.*19.*16"),
        ({f"{P}model.embed_tokens.weight": info(19, 8), f"{P}lm_head.weight": info(20, 8)}, "19 and 20"),
    ],
)
def test_what_cannot_be_merged_is_refused(tensors: dict[str, TensorInfo], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        adapter_vocabulary(tensors, NAMES, 16)


def test_the_number_of_tokens_is_changed_where_it_stands() -> None:
    config = {"vocab_size": 16, "text_config": {"vocab_size": 16}, "audio_config": {"vocab_size": 5}}
    assert resized(config, 16, 19) == {"vocab_size": 19, "text_config.vocab_size": 19}


def test_padding_rows_stay() -> None:
    old, new = torch.arange(8.0).reshape(4, 2), -torch.ones(3, 2)
    assert with_padding(new, old).tolist() == [[-1, -1], [-1, -1], [-1, -1], [6, 7]]
    assert old[0, 1] == 1
