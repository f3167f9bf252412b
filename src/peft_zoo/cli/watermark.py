"""`peft-zoo watermark`: makes a key, embeds its message in an autoencoder, and tests images for it.

The decoder of a key is kept in a file next to the key; neither gets into the output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import Command, Facts, Group, Result, table
from peft_zoo.common.checks import is_number
from peft_zoo.common.settings import method_options, setting
from peft_zoo.common.values import SettingError, needs_extra

if TYPE_CHECKING:
    from torch import nn

    from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
    from peft_zoo.tasks.watermark.decoder import KeyedDecoder
    from peft_zoo.tasks.watermark.key import WatermarkKey
    from peft_zoo.tasks.watermark.report import EmbedReport

EPILOG = """examples:
  peft-zoo watermark new-key owner.key --payload me
  peft-zoo watermark embed --vae my-model/vae --images photos/ --key owner.key --output marked-vae
  peft-zoo watermark verify --images suspects/ --key owner.key --fpr 1e-6

Keep owner.key and owner.key.decoder.safetensors secret: whoever has them can find, forge and remove the watermark. The
folder that embed writes has the watermark merged into the weights and can be published. If the watermark is not found
in images from the trained decoder, embed writes nothing and exits with status 1; so does verify without a watermark."""

MISTAKES = (ValueError, NotImplementedError, OSError, RuntimeError)  # of torch: unknown devices, unreadable tensors


@dataclass(frozen=True)
class KeyFlags:
    """Settings of `peft-zoo watermark new-key`."""

    path: str = setting("a new file, readable by you only", positional=True, required=True, metavar="FILE")
    num_bits: int = setting("bits of the message", 48)
    payload: str | None = setting("text that can be read back: 3 bytes in 48 bits (default none)", metavar="TEXT")
    errors: int | None = setting("wrong bits that are corrected in the payload (default 3)")


@dataclass(frozen=True)
class EmbedFlags:
    """Settings of `peft-zoo watermark embed`."""

    vae: str = setting("the folder of an autoencoder that diffusers saved", required=True, metavar="DIR")
    images: str = setting("the folder of the training images", required=True, metavar="DIR")
    key: str = setting("a key that new-key made", required=True, metavar="FILE")
    output: str = setting("a new folder for the marked autoencoder", required=True, metavar="DIR")
    size: int = setting("pixels per side of the training images", 256)
    device: str = setting("device of the training", "cpu")
    checkpoint: str | None = setting(
        "checkpoint file of the training; the same command continues an interrupted one", metavar="DIR"
    )
    options: dict[str, str] = method_options()


@dataclass(frozen=True)
class VerifyFlags:
    """Settings of `peft-zoo watermark verify`."""

    images: str = setting("a folder of images of one origin, or one image", required=True, metavar="DIR")
    key: str = setting("the key of the watermark", required=True, metavar="FILE")
    fpr: float = setting("false-positive rate", 1e-6)


def _new_key(flags: KeyFlags) -> Result:
    from peft_zoo.tasks.watermark.key import WatermarkKey

    payload = None if flags.payload is None else flags.payload.encode()
    errors = flags.errors or (0 if payload is None else 3)
    key = WatermarkKey.generate(flags.num_bits, payload, errors)
    key.save(flags.path)
    facts = {"written": f"{flags.path} (keep it secret, and a copy of it)", "commitment": key.commitment}
    return Result(table(facts), {"written": flags.path, "commitment": key.commitment, "num_bits": key.num_bits})


def _inputs(flags: EmbedFlags) -> tuple[WatermarkKey, KeyedDecoder | None, WatermarkLoraConfig]:
    """Reads the key and its decoder, if it exists, and builds the configuration."""
    from peft_zoo.common.atomic import check_new_folder
    from peft_zoo.tasks.base.methods import build_config
    from peft_zoo.tasks.watermark.key import WatermarkKey
    from peft_zoo.tasks.watermark.saved_decoder import decoder_path, load_decoder

    check_new_folder(Path(flags.output), "--output")
    key = WatermarkKey.load(flags.key)
    # A key has one decoder for all autoencoders: made by the first training, used again by the others.
    decoder = load_decoder(key, flags.key) if decoder_path(flags.key).is_file() else None
    known = {} if decoder is None else {"num_filters": str(decoder.num_filters)}
    options = {"num_bits": str(key.num_bits), **known, **flags.options, "commitment": key.commitment}
    config: Any = build_config("watermark_lora", options, {"target_modules": "last_up_block"})
    if decoder is not None and config.num_filters != decoder.num_filters:
        raise SettingError(
            f"num_filters={config.num_filters} differs from num_filters={decoder.num_filters} of the decoder of "
            f"{flags.key!r}, and a key has one decoder: leave it out, or use a new key."
        )
    return key, decoder, config


def _plan_embedding(flags: EmbedFlags) -> Facts:
    key, decoder, config = _inputs(flags)
    return {
        "autoencoder": _vae_folder(flags.vae),
        "images": len(_images(flags.images, flags.size)),
        "message": f"{key.num_bits} bits",
        "decoder": "calibrated first" if decoder is None else f"that of {flags.key}",
        "steps": config.steps,
        "output": flags.output,
    }


def _embed(flags: EmbedFlags) -> Result:
    from peft_zoo.tasks.watermark.embed import embed_watermark
    from peft_zoo.tasks.watermark.export import merge_and_export
    from peft_zoo.tasks.watermark.saved_decoder import save_decoder

    key, decoder, config = _inputs(flags)
    images = _images(flags.images, flags.size)
    vae = _load_vae(flags.vae).to(flags.device)
    report = embed_watermark(vae, images, config, key, decoder=decoder, checkpoint=flags.checkpoint)
    if not report.found:
        nothing = {"written": "nothing: train longer, or with a lower psnr_target"}
        return Result(table({**_facts(report), **nothing}), _data(report), ok=False)
    made = save_decoder(report.decoder, key, flags.key, report.calibration) if decoder is None else None
    try:
        merge_and_export(vae, flags.output, config, key, report.calibration)
    except BaseException:
        if made is not None:
            made.unlink()
        raise
    written = {
        "written": f"{flags.output} (merged; to publish)",
        "decoder": f"{flags.key}.decoder.safetensors (secret; verify needs it)",
    }
    return Result(table({**_facts(report), **written}), {**_data(report), "written": flags.output})


def _verify(flags: VerifyFlags) -> Result:
    from peft_zoo.tasks.watermark.saved_decoder import read_calibration
    from peft_zoo.tasks.watermark.verify import verify_watermark

    found = verify_watermark(_images(flags.images), flags.key, fpr=flags.fpr)
    calibration = read_calibration(flags.key)
    total = found.num_bits * found.n_images
    payload = {} if found.payload is None else {"payload": found.payload.decode(errors="backslashreplace")}
    facts = {
        "decision": "marked with this key" if found.decision else "no evidence of this key's watermark",
        "matches": f"{found.matches} of {total} bits in {found.n_images} images ({found.bit_accuracy:.1%})",
        "needed": f"{found.threshold} for a false-positive rate of {flags.fpr:g}",
        "p-value": f"{found.p_value:.3g}",
        **_false_positives(calibration),
        **payload,
    }
    names = ("decision", "matches", "num_bits", "n_images", "bit_accuracy", "threshold", "p_value")
    data = {name: getattr(found, name) for name in names}
    return Result(table(facts), {**data, "fpr": flags.fpr, **calibration, **payload}, found.decision)


def _vae_folder(folder: str) -> str:
    """Returns `folder` if it has the configuration of an autoencoder, else raises a SettingError."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise SettingError(
            f"--vae {folder!r} has no config.json: give the folder of an autoencoder, such as model/vae."
        )
    return folder


def _load_vae(folder: str) -> nn.Module:
    """Loads an autoencoder of diffusers in float32."""
    from peft_zoo.tasks.base.diffusers_files import load_model

    with needs_extra("peft-zoo watermark embed", "diffusion"):
        return load_model(Path(_vae_folder(folder)), f"--vae {folder!r}")


def _images(place: str, size: int | None = None) -> Any:
    """Opens the images of a folder, see `ImageFiles`."""
    with needs_extra("peft-zoo watermark", "vision"):
        from peft_zoo.tasks.base.images import ImageFiles
    return ImageFiles(place, size)


def _facts(report: EmbedReport) -> dict[str, str]:
    found = "found" if report.found else "NOT FOUND"
    return {
        "trained": f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        "measured": "on the first images of --images, 64 at most, which were trained on",
        "images": f"PSNR {report.psnr:.1f} dB, SSIM {report.ssim:.3f} to the clean autoencoder's",
        "bits": f"{report.bit_accuracy:.2%} right (clean images: {report.clean_bit_accuracy:.1%})",
        "mark": f"{found} in all of them together, in {report.found_alone:.1%} of them alone, at a false-positive "
        f"rate of {report.detection_fpr:.3g}",
        **_false_positives(report.calibration),
    }


def _data(report: EmbedReport) -> dict[str, Any]:
    """Returns the plain values of a report."""
    return {name: value for name, value in vars(report).items() if name not in ("trace", "decoder")}


def _false_positives(calibration: Mapping[str, Any]) -> dict[str, str]:
    """Returns the false-positive rate that was measured when the decoder was made, if it is known."""
    measured, nominal = calibration.get("measured_fpr"), calibration.get("nominal_fpr")
    if not is_number(measured) or not is_number(nominal):
        return {}
    return {"fpr": f"{measured:.3g} measured on clean images, at a nominal {nominal:.3g}"}


COMMAND = Group(
    "embed a watermark in an autoencoder, or test images for one",
    {
        "new-key": Command("make a key", _new_key, KeyFlags, mistakes=MISTAKES),
        "embed": Command(
            "train a watermark into an autoencoder", _embed, EmbedFlags, plan=_plan_embedding, mistakes=MISTAKES
        ),
        "verify": Command("test images for the watermark of a key", _verify, VerifyFlags, mistakes=MISTAKES),
    },
    description="Embed a secret message in the decoder of an autoencoder, or test images for it.",
    epilog=EPILOG,
)
