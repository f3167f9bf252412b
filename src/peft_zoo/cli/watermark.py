"""`peft-zoo watermark`: make a key, embed its message in an autoencoder, and test images for it.

What the library raises becomes one sentence. A decoder is kept beside its key; neither gets into the output.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import pairs, plain_warnings, sentence
from peft_zoo.common.values import SettingError, parse_value

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

Keep owner.key and owner.key.decoder.safetensors to yourself: who has them can find, forge and remove the mark. What
embed writes to --output has the mark merged into the weights and is for publishing. If the mark is not found in what
the trained decoder makes of the pictures, nothing is written and the status is 1, as it is of verify without a mark."""

ACTIONS = ("new-key", "embed", "verify")
FLAGS = {
    "new-key": ("--num-bits", "--payload", "--errors"),
    "embed": ("--vae", "--images", "--key", "--output", "--size", "--device", "--checkpoint", "--set"),
    "verify": ("--images", "--key", "--fpr"),
}


def add_parser(commands: Any) -> None:
    """Add the command to the program's.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "watermark",
        help="embed a watermark in an autoencoder, or test images for one",
        description="Embed a secret message in the decoder of an autoencoder, or test images for it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{new-key,embed,verify}")
    new = actions.add_parser("new-key", help="make a key", allow_abbrev=False)
    new.add_argument("path", metavar="FILE", help="a new file, readable by you only")
    new.add_argument("--num-bits", metavar="N", default="48", help="bits of the message (default 48)")
    new.add_argument("--payload", metavar="TEXT", help="what can be read back: 3 bytes of 48 bits (default nothing)")
    new.add_argument("--errors", metavar="N", help="wrong bits that are corrected in the payload (default 3)")
    embed = actions.add_parser("embed", help="train a mark into an autoencoder", allow_abbrev=False)
    embed.add_argument("--vae", metavar="DIR", required=True, help="an autoencoder that diffusers has saved")
    embed.add_argument("--images", metavar="DIR", required=True, help="pictures to train on")
    embed.add_argument("--key", metavar="FILE", required=True, help="made by new-key")
    embed.add_argument("--output", metavar="DIR", required=True, help="a new folder for the marked autoencoder")
    embed.add_argument("--size", metavar="N", default="256", help="pixels of the squares to train on (default 256)")
    embed.add_argument("--device", metavar="NAME", default="cpu", help="where to train (default cpu)")
    embed.add_argument("--checkpoint", metavar="DIR", help="keeps the state of training; start again to go on from it")
    embed.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the method")
    verify = actions.add_parser("verify", help="test images for the mark of a key", allow_abbrev=False)
    verify.add_argument("--images", metavar="DIR", required=True, help="pictures of one origin, or one picture")
    verify.add_argument("--key", metavar="FILE", required=True, help="that the mark was embedded with")
    verify.add_argument("--fpr", metavar="X", default="1e-6", help="false-positive rate (default 1e-6)")


def flags(options: argparse.Namespace) -> list[str]:
    """All flags of the action that was asked for."""
    return list(FLAGS[options.action])


def run(options: argparse.Namespace) -> tuple[str, bool]:
    """Do what was asked for.

    Returns:
        What to print, and whether all is well: False for images without the mark, or a training that gave none.

    Raises:
        SettingError: If it cannot be done, in one sentence.
    """
    action = {"new-key": _new_key, "embed": _embed, "verify": _verify}[options.action]
    with plain_warnings():
        try:
            return action(options)
        except SettingError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise SettingError(sentence(error)) from error


def _new_key(options: argparse.Namespace) -> tuple[str, bool]:
    from peft_zoo.tasks.watermark.key import WatermarkKey

    payload = None if options.payload is None else options.payload.encode()
    asked = options.errors or ("0" if payload is None else "3")
    bits, errors = parse_value(options.num_bits, int, "--num-bits"), parse_value(asked, int, "--errors")
    key = WatermarkKey.generate(bits, payload, errors)
    key.save(options.path)
    facts = {"written": f"{options.path} (keep it secret, and a copy of it)", "commitment": key.commitment}
    return _table(facts), True


def _embed(options: argparse.Namespace) -> tuple[str, bool]:
    from peft_zoo.common.atomic import check_new_folder
    from peft_zoo.tasks.watermark.embed import embed_watermark
    from peft_zoo.tasks.watermark.export import merge_and_export
    from peft_zoo.tasks.watermark.key import WatermarkKey
    from peft_zoo.tasks.watermark.saved_decoder import decoder_path, load_decoder, save_decoder

    check_new_folder(Path(options.output), "--output")
    key = WatermarkKey.load(options.key)
    # One key has one decoder, whatever it marks: the first time it is made, then it is used again.
    decoder = load_decoder(key, options.key) if decoder_path(options.key).is_file() else None
    config = _config(options, key, decoder)
    images = load_images(options.images, parse_value(options.size, int, "--size"))
    vae = load_vae(options.vae).to(options.device)
    report = embed_watermark(vae, images, config, key, decoder=decoder, checkpoint=options.checkpoint)
    if not report.found:
        return _table({**_facts(report), "written": "nothing: train longer, or with a lower psnr_target"}), False
    made = save_decoder(report.decoder, key, options.key, report.calibration) if decoder is None else None
    try:
        merge_and_export(vae, options.output, config, key, report.calibration)
    except BaseException:
        if made is not None:
            made.unlink()
        raise
    written = {
        "written": f"{options.output} (merged; to publish)",
        "decoder": f"{options.key}.decoder.safetensors (secret; verify needs it)",
    }
    return _table({**_facts(report), **written}), True


def _verify(options: argparse.Namespace) -> tuple[str, bool]:
    from peft_zoo.tasks.watermark.saved_decoder import read_calibration
    from peft_zoo.tasks.watermark.verify import verify_watermark

    fpr = parse_value(options.fpr, float, "--fpr")
    found = verify_watermark(load_images(options.images), options.key, fpr=fpr)
    total = found.num_bits * found.n_images
    facts = {
        "decision": "marked with this key" if found.decision else "no evidence of this key's mark",
        "matches": f"{found.matches} of {total} bits in {found.n_images} images ({found.bit_accuracy:.1%})",
        "needed": f"{found.threshold} for a false-positive rate of {fpr:g}",
        "p-value": f"{found.p_value:.3g}",
        **_false_positives(read_calibration(options.key)),
    }
    if found.payload is not None:
        facts["payload"] = found.payload.decode(errors="backslashreplace")
    return _table(facts), found.decision


def _config(options: argparse.Namespace, key: WatermarkKey, decoder: KeyedDecoder | None) -> WatermarkLoraConfig:
    from peft_zoo.tasks.base.methods import build_config

    known = {} if decoder is None else {"num_filters": str(decoder.num_filters)}
    given = {"num_bits": str(key.num_bits), **known, **pairs(options.set), "commitment": key.commitment}
    config: Any = build_config("watermark_lora", given, {"target_modules": "last_up_block"}, steps=0)
    if decoder is not None and config.num_filters != decoder.num_filters:
        raise SettingError(
            f"num_filters={config.num_filters} is not the {decoder.num_filters} of the decoder beside {options.key!r}, "
            "and a key has one decoder: leave it out, or use a new key."
        )
    return config


def load_vae(folder: str) -> nn.Module:
    """An autoencoder from a folder that diffusers has written, in float32.

    Raises:
        SettingError: If diffusers is not installed or the folder has no autoencoder.
    """
    try:
        from diffusers import AutoModel
    except ImportError:
        raise SettingError("embed needs diffusers: pip install 'peft-zoo[diffusion]'.") from None
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise SettingError(
            f"--vae {folder!r} has no config.json: give the folder of an autoencoder, such as model/vae."
        )
    return AutoModel.from_pretrained(folder, local_files_only=True).eval()


def load_images(place: str, size: int | None = None) -> Any:
    """Pictures of a folder and of those below it, in the order of their names; or of one file.

    Args:
        place: The folder, or a file.
        size: Pixels of a square that each is cropped and scaled to; None leaves them as they are.

    Returns:
        The images, each `(3, height, width)` in [0, 1], read when they are looked at.

    Raises:
        SettingError: If there are no pictures, the size is not positive, or Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise SettingError("pictures need Pillow: pip install 'peft-zoo[vision]'.")
    from peft_zoo.tasks.base.images import ImageFiles

    return ImageFiles(place, size)


def _facts(report: EmbedReport) -> dict[str, str]:
    return {
        "trained": f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        "measured": "on the first pictures of --images, 64 at most, which were trained on",
        "picture": f"PSNR {report.psnr:.1f} dB, SSIM {report.ssim:.3f} to the clean autoencoder's",
        "bits": f"{report.bit_accuracy:.2%} right (clean images: {report.clean_bit_accuracy:.1%})",
        "mark": f"{'found' if report.found else 'NOT FOUND'} in all of them together, in {report.found_alone:.1%} of "
        f"them alone, at a false-positive rate of {report.detection_fpr:.3g}",
        **_false_positives(report.calibration),
    }


def _false_positives(calibration: Mapping[str, Any]) -> dict[str, str]:
    """What was measured when the decoder was made, if that is known."""
    if not {"nominal_fpr", "measured_fpr"} <= calibration.keys():
        return {}
    measured, nominal = calibration["measured_fpr"], calibration["nominal_fpr"]
    return {"fpr": f"{measured:.3g} measured on clean images, at a nominal {nominal:.3g}"}


def _table(facts: dict[str, str]) -> str:
    return "\n".join(f"{key:<12}{value}" for key, value in facts.items())
