"""Which tied tensors need values of their own after a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_zoo.merge.checkpoint.config_changes import untie
from peft_zoo.merge.checkpoint.ties import TiePlan, Ties, plan_ties

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(tied: bool = True) -> Any:
    size: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=tied, **size))


def t5() -> Any:
    with torch.device("meta"):
        return T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
        )


NOTHING = TiePlan({}, {}, False)
ON_DISK = {EMBEDDING}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, NOTHING),
        ({EMBEDDING: "a"}, TiePlan({HEAD: EMBEDDING}, {}, True)),
        ({HEAD: "a"}, TiePlan({HEAD: EMBEDDING}, {}, True)),
        ({EMBEDDING: "a", HEAD: "b"}, TiePlan({HEAD: EMBEDDING}, {}, True)),
        ({EMBEDDING: "a", HEAD: "a"}, NOTHING),
    ],
)
def test_tensors_that_differ_get_values_of_their_own(changes: dict[str, str], wanted: TiePlan) -> None:
    assert plan_ties(Ties.of(llama()), changes, ON_DISK) == wanted


def test_both_in_the_files_need_only_the_configuration() -> None:
    assert plan_ties(Ties.of(llama()), {HEAD: "a"}, {EMBEDDING, HEAD}) == TiePlan({}, {}, True)


def test_nothing_is_tied_without_the_field() -> None:
    assert plan_ties(Ties.of(llama(tied=False)), {HEAD: "a"}, {EMBEDDING, HEAD}) == NOTHING


def test_share_gives_both_what_happens_to_one() -> None:
    assert plan_ties(Ties.of(llama()), {EMBEDDING: "a"}, ON_DISK, "share") == TiePlan({}, {HEAD: EMBEDDING}, False)
    with pytest.raises(ValueError, match=rf"tied='share'.*{HEAD}"):
        plan_ties(Ties.of(llama()), {EMBEDDING: "a", HEAD: "b"}, ON_DISK, "share")


def test_refuse_names_both() -> None:
    with pytest.raises(ValueError, match=rf"tied='refuse'.*{HEAD}.*{EMBEDDING}"):
        plan_ties(Ties.of(llama()), {HEAD: "a"}, ON_DISK, "refuse")


def test_an_encoder_and_decoder_keep_the_field_and_the_tensors_that_are_equal() -> None:
    model = t5()
    others = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD]
    assert set(Ties.of(model).groups["shared.weight"]) == set(others)
    assert plan_ties(Ties.of(model), {HEAD: "a"}, {"shared.weight"}) == TiePlan({HEAD: "shared.weight"}, {}, False)
    found = plan_ties(Ties.of(model), {"shared.weight": "a"}, {"shared.weight"})
    assert found == TiePlan(dict.fromkeys(others, "shared.weight"), {}, False)


def test_biases_may_be_tied_too() -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16))
    bias = "cls.predictions.bias"
    assert bias in {name for members in Ties.of(model).members for name in members}


def test_untie_reaches_inner_configurations() -> None:
    config = {"text_config": {"tie_word_embeddings": True, "rope": {}}, "vision_config": {"tie_word_embeddings": False}}
    assert untie(config) == {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}
