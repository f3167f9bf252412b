"""EW-LoRA in a pretrained autoencoder: bits, pictures, detection, false alarms, attacks, and what it costs.

    python -m benchmarks.watermark             measure, print, write benchmarks/results/watermark_<device>.json
    python -m benchmarks.watermark --quick     a random autoencoder and generated pictures, in seconds; writes nothing
    python -m benchmarks.watermark --docs      the tables of the saved results into the page of the method

Marks of 16, 32 and 48 bits, each with three keys, are trained into TAEF2 with the default controller; at the most bits
also with the paper's own (dlws), with images changed on their way while training (augmented), and into all weights of
the decoder in place of a LoRA ("full"), with the same losses. Clean images go through the same attacks as a control.
All is measured on pictures that no training has seen, the clean decoder's images being the reference. Finished
trainings are kept; started again with the same arguments, a run that was killed goes on.

A figure is only reported if the merged decoder makes the images that the trained one makes, and the exact test gives
no more false alarms than it says. If one is wrong, nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.watermark import attacks as watermark_attacks
from benchmarks.watermark import report as watermark_report
from benchmarks.watermark.marks import (
    CHUNK,
    Mark,
    Subject,
    WrongFigureError,
    config_of,
    key_of,
    train_full,
    train_lora,
)
from peft_zoo.common.modules import frozen
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.image_quality import psnr, ssim
from peft_zoo.tasks.watermark.significance import MatchDistribution, bits_needed, count_false_alarms
from peft_zoo.tasks.watermark.vae import decode, reconstruct

CIFAR = common.ROOT.parent / "shared" / "data" / "images" / "cifar10_jpg_8k_2k.zip"
RATES = (1e-2, 1e-6)  # false-positive rates at which marks are to be found
POOLED = 9  # images of one test; an odd number never splits in half
COUNTED_RATES = (1e-3, 1e-2)  # false-positive rates that can be counted
GROUPS = (1, 8, 32)  # images of one test, where false alarms are counted
MESSAGES = 20_000
FULL_RATE = 5e-4  # Stable Signature's, which trains all of a decoder
LORAS: dict[str, dict[str, Any]] = {
    "two_sided": {},
    "dlws": {"controller": "dlws"},
    "augmented": {"augmentations": ["crop", "resize", "jpeg", "noise"]},
}
QUICK = {"bits": [24], "seeds": [0], "steps": 4, "size": 32, "pictures": 80, "held_out": 36, "num_filters": 32}
SETTINGS = (
    *("device", "quick", "size", "pictures", "held_out", "steps", "batch_size", "num_filters", "psnr_target"),
    *("bit_target", "learning_rate", "full_rate"),
)


# ---- measuring ----


@torch.no_grad()
def images_of(vae: Any, latents: Tensor) -> Tensor:
    """What a decoder makes of latents."""
    return torch.cat([decode(vae, batch) for batch in latents.split(CHUNK)])


@torch.no_grad()
def bits_of(decoder: KeyedDecoder, images: Tensor) -> Tensor:
    """Bits of each image, `(N, n)` bool."""
    return torch.cat([decoder(batch) > 0 for batch in images.split(CHUNK)])


def found(read: Tensor, message: Tensor, images: int, rate: float) -> float | None:
    """Share of the groups of so many images in which the exact test finds the message; None if there are too few bits.

    Args:
        read: `(N, n)`, bits of each image.
        message: `(n,)`.
        images: Of a group.
        rate: False-positive rate.
    """
    if bits_needed(rate) > len(message):
        return None
    groups = list(read.split(images)[: len(read) // images])
    matches = torch.stack([(group == message).sum() for group in groups]).tolist()
    if images == 1:  # the same threshold for all
        limits = [MatchDistribution.of(groups[0].cpu()).threshold(rate)] * len(groups)
    else:
        limits = [MatchDistribution.of(group.cpu()).threshold(rate) for group in groups]
    hits = [limit is not None and match >= limit for match, limit in zip(matches, limits, strict=True)]
    return sum(hits) / len(hits)


def false_alarms(read: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Share of random messages that are found in images which carry none of them, by the exact and the usual test.

    Args:
        read: `(N, n)`, bits of each image.
        seed: Of the messages, the same for all groups of images.

    Returns:
        For each number of images of one test, shares by `watermark_report.alarm`.
    """
    return {
        str(images): {
            watermark_report.alarm(test, rate): share
            for rate in COUNTED_RATES
            for test, share in count_false_alarms(read, images, rate, MESSAGES, seed)._asdict().items()
        }
        for images in GROUPS
        if images <= len(read)
    }


def scores(mark: Mark, images: Tensor) -> dict[str, Any]:
    """Bit accuracy, and how often groups of images are recognized at the smallest rate."""
    read = bits_of(mark.decoder, images)
    accuracy = float((read == mark.message).double().mean())
    return {"bit_accuracy": accuracy, "found": found(read, mark.message, POOLED, min(RATES))}


def measure(subject: Subject, mark: Mark, bits: int, seed: int) -> dict[str, Any]:
    """All figures of a mark but attacks, on pictures it was not trained on.

    Raises:
        WrongFigureError: If the exact test gives more false alarms than it says, or a figure is not finite.
    """
    marked, report = images_of(mark.vae, subject.latents), mark.report
    read, unmarked = bits_of(mark.decoder, marked), bits_of(mark.decoder, subject.clean)
    chunks = list(zip(marked.split(CHUNK), subject.clean.split(CHUNK), strict=True))
    other = subject.decoder(key_of(bits, seed, "other"), config_of(subject.options, bits, seed))
    result = {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "seconds_to_99": report.seconds_to(0.99),
        "psnr": float(psnr(marked, subject.clean).mean()),
        "ssim": float(torch.cat([ssim(*chunk) for chunk in chunks]).mean()),
        "bit_accuracy": float((read == mark.message).double().mean()),
        "clean_bit_accuracy": float((unmarked == mark.message).double().mean()),
        "found": {f"{m}, {rate:g}": found(read, mark.message, m, rate) for m in (1, POOLED) for rate in RATES},
        "false_alarms": {
            "clean images": false_alarms(unmarked, seed),
            "images of another key": false_alarms(bits_of(other, marked), seed),
        },
        "trace": [
            {k: entry[k] for k in ("step", "psnr", "bit_accuracy")}
            for entry in report.trace[:: report.steps // 50 or 1]
        ],
    }
    check(result)
    return result


def check(result: dict[str, Any]) -> None:
    """Refuse figures that cannot be.

    Raises:
        WrongFigureError: If the exact test gives more false alarms than it says, or a figure is not finite.
    """
    for where, groups in result["false_alarms"].items():
        for (images, shares), rate in product(groups.items(), COUNTED_RATES):
            share = shares[watermark_report.alarm("exact", rate)]
            # Messages are independent, groups of images that share them are not: the deviation is at most this one.
            if share > rate + 5 * (rate / MESSAGES) ** 0.5:
                raise WrongFigureError(
                    f"{where}, {images} at once: {share:.2e} false alarms of the exact test at {rate:g}"
                )
    if not all(math.isfinite(result[name]) for name in ("psnr", "ssim", "bit_accuracy", "seconds")):
        raise WrongFigureError("figures are not finite")


def attack(subject: Subject, mark: Mark, bits: int, seed: int) -> dict[str, dict[str, Any]]:
    """What is left of a mark."""
    marked, options = images_of(mark.vae, subject.latents), subject.options

    def sent(made: Tensor) -> dict[str, dict[str, Any]]:
        with torch.no_grad():
            found = {name: scores(mark, change(made)) for name, change in watermark_attacks.IMAGES.items()}
        with frozen(subject.vae):
            return {**found, "encoded again": scores(mark, reconstruct(subject.vae, made, CHUNK)[1])}

    images, controls = sent(marked), sent(subject.clean)

    def judged(vae: Any) -> dict[str, Any]:
        made = images_of(vae, subject.latents)
        return {**scores(mark, made), "psnr": float(psnr(made, subject.clean).mean())}

    changed = partial(watermark_attacks.changed, mark.vae, subject.vae)
    weights = {name: judged(changed(change)) for name, change in watermark_attacks.WEIGHTS.items()}
    steps = max(options.steps // 4, 1)
    second = config_of(options, bits, seed, steps=steps)
    marked_twice = train_lora(subject, mark.vae, key_of(bits, seed, "second owner"), second).vae
    weights[f"a second mark, {steps} steps"] = judged(marked_twice)
    for step, vae in watermark_attacks.fine_tuned(mark.vae, subject.attacker, options.batch_size):
        weights[f"fine-tuning, {step} steps"] = judged(vae)
    return {"images": images, "controls": controls, "weights": weights}


# ---- all of it ----


class Benchmark:
    """Trains, measures, and remembers what is done.

    Args:
        options: The command line.

    Raises:
        ValueError: If the file of runs is of other settings.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.path = options, options.runs
        settings = {name: getattr(options, name) for name in SETTINGS}
        if self.path and self.path.is_file():  # perhaps of another machine, to be reported here
            self.record: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self.record = {"machine": common.machine(torch.device(options.device)), "settings": settings, "runs": {}}
        if unlike := watermark_report.differing(self.record["settings"], settings):
            raise ValueError(f"--runs {str(self.path)!r} has another {', '.join(sorted(unlike))}: give another file.")

    @cached_property
    def subject(self) -> Subject:
        return Subject.of(self.options)

    def plan(self) -> Iterator[tuple[str, int, int]]:
        """Method, bits and seed of each training."""
        for seed, method in product(self.options.seeds, self.options.methods):
            lengths = self.options.bits if method == "two_sided" else [max(self.options.bits)]
            yield from ((method, bits, seed) for bits in lengths)

    def run(self, method: str, bits: int, seed: int) -> dict[str, Any]:
        """One training with its figures."""
        subject, key = self.subject, key_of(bits, seed)
        if method == "full":
            config = config_of(self.options, bits, seed, learning_rate=self.options.full_rate)
            mark = train_full(subject, subject.vae, key, config)
        else:
            config = config_of(self.options, bits, seed, **LORAS[method])
            mark = train_lora(subject, subject.vae, key, config)
        result = measure(subject, mark, bits, seed)
        return result if method == "full" else {**result, "attacks": attack(subject, mark, bits, seed)}

    def all(self) -> list[str]:
        """Do what is not on record.

        Returns:
            What is wrong.
        """
        mistakes = []
        for method, bits, seed in self.plan():
            name, start = f"{method}/{bits}/{seed}", time.perf_counter()
            if name not in self.record["runs"]:
                try:
                    self.record["runs"][name] = self.run(method, bits, seed)
                except WrongFigureError as error:
                    mistakes.append(f"{name}: {error}")
                    continue
                if self.path:
                    common.write_json(self.path, self.record)
                seconds = time.perf_counter() - start
                print(f"{name}: {line(self.record['runs'][name])}, {seconds:.0f} s in all", flush=True)
        return mistakes


def line(run: dict[str, Any]) -> str:
    """The most important of a run."""
    return (
        f"{run['psnr']:.2f} dB, SSIM {run['ssim']:.4f}, {run['bit_accuracy']:.2%} of bits right, "
        f"{run['seconds']:.1f} s of training"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        if options.docs:
            watermark_report.write_docs(*options.docs)
            return 0
        benchmark = Benchmark(options)
        print(common.describe(benchmark.record["machine"]), flush=True)
        mistakes = benchmark.all()
    except (ValueError, SettingError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(mistakes))
    if mistakes:
        return 1
    names = [f"{method}/{bits}/{seed}" for method, bits, seed in benchmark.plan()]  # a record may have more
    runs = {name: benchmark.record["runs"][name] for name in names}
    result = {"benchmark": "watermark", **benchmark.record, "runs": runs}
    print(watermark_report.tables(result))
    usual = common.result_path("watermark", result["machine"]["device"])
    path = options.json or (None if options.quick else usual)
    if path:
        common.write_json(path, result)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.watermark.suite", description=__doc__.split("\n\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny random autoencoder; writes no file unless --json is given")
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    add("--images", type=Path, default=CIFAR, help="pictures, in folders or a .zip file: train/CLASS/*.jpg, test/...")
    add("--taef2", type=Path, help="the folder with the weights of TAEF2 (default: where PEFT_ZOO_TAEF2 points)")
    add("--bits", type=int, nargs="+", default=[48, 32, 16], help="lengths of messages (default 48 32 16)")
    known = (*LORAS, "full")
    add("--methods", nargs="+", choices=known, default=list(known), help="of training (default all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of keys and trainings (default 0 1 2)")
    add("--size", type=int, default=64, help="pixels of a side (default 64)")
    add("--pictures", type=int, default=2048, help="to train on and to calibrate with (default 2048)")
    add("--held-out", type=int, default=512, help="to measure on, and as many for the attacker (default 512)")
    add("--steps", type=int, default=1000, help="of a training (default 1000)")
    add("--batch-size", type=int, default=4, help="pictures of a step (default 4)")
    add("--num-filters", type=int, help="of the keyed decoder (default the method's)")
    add("--psnr-target", type=float, help="in dB (default the method's)")
    add("--bit-target", type=float, help="share of right bits that is good enough (default the method's)")
    add("--learning-rate", type=float, help="of a LoRA (default the method's)")
    add("--full-rate", type=float, default=5e-4, help="learning rate of the whole decoder (default 5e-4)")
    add("--runs", type=Path, help="keeps finished trainings (default runs/watermark_<device>.json)")
    add("--json", type=Path, help="where to save (default benchmarks/results/watermark_<device>.json)")
    page = "only put the tables of a saved result into the method's page; further ones add their keys, without times"
    add("--docs", type=Path, metavar="JSON", nargs="+", help=page)
    parser.set_defaults(**(QUICK if "--quick" in (sys.argv if arguments is None else arguments) else {}))
    options = parser.parse_args(arguments)
    options.bits = sorted(set(options.bits), reverse=True)
    if not options.quick and not options.runs:
        options.runs = common.ROOT / "runs" / f"watermark_{options.device}.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
