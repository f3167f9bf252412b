"""One training that the tests of training, verification, decoder files and export look at."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_zoo.tasks.watermark.vae import decode, reconstruct
from peft_zoo.watermark import EmbedReport, embed_watermark
from tests.tasks.watermark.samples import KEY, pictures, tiny_vae, watermark


class Embedded:
    """A marked autoencoder, and images that it was not trained on; tests must not change it."""

    def __init__(self) -> None:
        self.config = watermark(steps=60, commitment=KEY.commitment)
        self.vae, self.images = tiny_vae(), pictures(48)
        self.before = copy.deepcopy(self.vae.state_dict())
        self.report: EmbedReport = embed_watermark(self.vae, self.images, self.config, KEY)
        self.decoder = self.report.decoder
        self.latents, self.clean = reconstruct(tiny_vae(), pictures(24, seed=5))
        with torch.no_grad():
            self.marked = decode(self.vae, self.latents)


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    torch.manual_seed(0)
    return Embedded()
