"""Tiny but real models and data, made on the spot, for running whole tasks in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps under an old tree by the river"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a tokenizer of one token a character, saved as any model is."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\n"
    vocabulary = {"<unk>": 0, "</s>": 1, **{letter: index for index, letter in enumerate(letters, 2)}}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short paragraphs."""
    random = np.random.default_rng(0)
    blocks = [" ".join(random.choice(WORDS.split(), size=16)) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(blocks), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a small network tells apart: reddish and bluish noise, 12 training and 6 test images each."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, channel in (("blue", 2), ("red", 0)):
            target = folder / split / label
            target.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 100, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(target / f"{index}.png")
    return folder


def tiny_vit(classes: int) -> nn.Module:
    """A ViT of two blocks for images of 16 pixels, made by timm as the large ones are."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=classes, **shape)
