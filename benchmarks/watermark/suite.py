"""EW-LoRA in a pretrained autoencoder: bit accuracy, image quality, detection, false alarms, attacks and cost.

    python -m benchmarks.watermark             measure, print, write benchmarks/results/watermark_<device>.json
    python -m benchmarks.watermark --quick     use a random autoencoder and generated images, in seconds; write nothing
    python -m benchmarks.watermark --docs      write the tables of saved results to the page of the method

Marks of 16, 32 and 48 bits, each with three keys, are trained in TAEF2 with the default controller; with the most bits
also with the paper's controller (dlws), with augmentations (augmented), and in all weights of the decoder instead of a
LoRA ("full"), with the same losses. Clean images undergo the same attacks as a control. All values are measured on
held-out images; the reference is the clean decoder. Finished trainings are stored, and an interrupted run resumes when
started with the same arguments.

A value is reported only if the merged decoder reproduces the images of the trained one and the exact test keeps its
false-positive rate. Otherwise nothing is saved and the exit status is 1.
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
from benchmarks.watermark import attacks, tables
from benchmarks.watermark.binomial import binomial_threshold
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
from peft_zoo.tasks.watermark.significance import MatchDistribution, bits_needed, false_alarm_rate
from peft_zoo.tasks.watermark.vae import decode, reconstruct

CIFAR = common.ROOT.parent / "shared" / "data" / "images" / "cifar10_jpg_8k_2k.zip"
RATES = (1e-2, 1e-6)  # false-positive rates of detection
POOLED = 9  # images per test; an odd number has no ties
COUNTED_RATES = (1e-3, 1e-2)  # false-positive rates large enough to count false alarms
GROUPS = (1, 8, 32)  # images per test for counting false alarms
MESSAGES = 20_000
TESTS = {"exact": None, "binomial": binomial_threshold}  # thresholds for `false_alarm_rate`
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


@torch.no_grad()
def images_of(vae: Any, latents: Tensor) -> Tensor:
    """Decodes latents."""
    return torch.cat([decode(vae, batch) for batch in latents.split(CHUNK)])


@torch.no_grad()
def bits_of(decoder: KeyedDecoder, images: Tensor) -> Tensor:
    """Returns the bits of each image, bool `(N, n)`."""
    return torch.cat([decoder(batch) > 0 for batch in images.split(CHUNK)])


def found(read: Tensor, message: Tensor, images: int, rate: float) -> float | None:
    """Returns the share of image groups in which the exact test detects the message, None if it has too few bits.

    Args:
        read: Bits of each image, `(N, n)`.
        message: Bits `(n,)`.
        images: Images per group.
        rate: False-positive rate.
    """
    if bits_needed(rate) > len(message):
        return None
    groups = list(read.split(images)[: len(read) // images])
    matches = torch.stack([(group == message).sum() for group in groups]).tolist()
    if images == 1:  # the threshold does not depend on the bits
        limits = [MatchDistribution.of(groups[0].cpu()).threshold(rate)] * len(groups)
    else:
        limits = [MatchDistribution.of(group.cpu()).threshold(rate) for group in groups]
    hits = [limit is not None and match >= limit for match, limit in zip(matches, limits, strict=True)]
    return sum(hits) / len(hits)


def false_alarms(read: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Measures the false-positive rates of the exact and the binomial test on unmarked images.

    Args:
        read: Bits of each image, `(N, n)`.
        seed: Seed of the random messages, the same for all group sizes.

    Returns:
        Maps images per test to rates by `tables.alarm_name`.
    """
    return {
        str(images): {
            tables.alarm_name(test, rate): false_alarm_rate(read, images, rate, MESSAGES, seed, threshold)
            for rate in COUNTED_RATES
            for test, threshold in TESTS.items()
        }
        for images in GROUPS
        if images <= len(read)
    }


def seconds_to(trace: list[dict[str, float]], bit_accuracy: float, window: int = 10) -> float | None:
    """Returns the seconds until the mean bit accuracy over `window` steps first reached a value, None if never."""
    values = [entry["bit_accuracy"] for entry in trace]
    for end in range(window, len(values) + 1):
        if sum(values[end - window : end]) >= bit_accuracy * window:
            return trace[end - 1]["seconds"]
    return None


def scores(mark: Mark, images: Tensor) -> dict[str, Any]:
    """Returns bit accuracy, and the detection rate of image groups at the smallest false-positive rate."""
    read = bits_of(mark.decoder, images)
    accuracy = float((read == mark.message).double().mean())
    return {"bit_accuracy": accuracy, "found": found(read, mark.message, POOLED, min(RATES))}


def measure(subject: Subject, mark: Mark, bits: int, seed: int) -> dict[str, Any]:
    """Measures everything about a mark except attacks, on held-out images.

    Raises:
        WrongFigureError: If the exact test exceeds its false-positive rate, or a value is not finite.
    """
    marked, report = images_of(mark.vae, subject.latents), mark.report
    read, unmarked = bits_of(mark.decoder, marked), bits_of(mark.decoder, subject.clean)
    chunks = list(zip(marked.split(CHUNK), subject.clean.split(CHUNK), strict=True))
    other = subject.decoder(key_of(bits, seed, "other"), config_of(subject.options, bits, seed))
    result = {
        "parameters": report.parameters,
        "seconds": report.seconds,
        "seconds_to_99": seconds_to(report.trace, 0.99),
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
    """Checks measured values.

    Raises:
        WrongFigureError: If the exact test exceeds its false-positive rate, or a value is not finite.
    """
    for where, groups in result["false_alarms"].items():
        for (images, shares), rate in product(groups.items(), COUNTED_RATES):
            share = shares[tables.alarm_name("exact", rate)]
            # Five upper bounds of the standard deviation; groups share messages, so their tests are not independent.
            if share > rate + 5 * (rate / MESSAGES) ** 0.5:
                raise WrongFigureError(
                    f"{where}, {images} per test: {share:.2e} false alarms of the exact test at {rate:g}"
                )
    if not all(math.isfinite(result[name]) for name in ("psnr", "ssim", "bit_accuracy", "seconds")):
        raise WrongFigureError("values are not finite")


def attack(subject: Subject, mark: Mark, bits: int, seed: int) -> dict[str, dict[str, Any]]:
    """Measures a mark after each attack on images and weights, and clean images as a control."""
    marked, options = images_of(mark.vae, subject.latents), subject.options

    def sent(made: Tensor) -> dict[str, dict[str, Any]]:
        with torch.no_grad():
            found = {name: scores(mark, change(made)) for name, change in attacks.IMAGES.items()}
        with frozen(subject.vae):
            return {**found, "encoded again": scores(mark, reconstruct(subject.vae, made, CHUNK)[1])}

    images, controls = sent(marked), sent(subject.clean)

    def judged(vae: Any) -> dict[str, Any]:
        made = images_of(vae, subject.latents)
        return {**scores(mark, made), "psnr": float(psnr(made, subject.clean).mean())}

    changed = partial(attacks.changed, mark.vae, subject.vae)
    weights = {name: judged(changed(change)) for name, change in attacks.WEIGHTS.items()}
    steps = max(options.steps // 4, 1)
    second = config_of(options, bits, seed, steps=steps)
    marked_twice = train_lora(subject, mark.vae, key_of(bits, seed, "second owner"), second).vae
    weights[f"a second mark, {steps} steps"] = judged(marked_twice)
    for step, vae in attacks.fine_tuned(mark.vae, subject.attacker, options.batch_size, attacks.FINE_TUNING_STEPS):
        weights[f"fine-tuning, {step} steps"] = judged(vae)
    return {"images": images, "controls": controls, "weights": weights}


class Benchmark:
    """Trains and measures all marks, and stores finished runs.

    Args:
        options: Command-line options.

    Raises:
        ValueError: If the file of runs has other settings.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.path = options, options.runs
        settings = {name: getattr(options, name) for name in SETTINGS}
        if self.path and self.path.is_file():  # may come from another machine
            self.record: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self.record = {"machine": common.machine(torch.device(options.device)), "settings": settings, "runs": {}}
        if unlike := tables.differing(self.record["settings"], settings):
            raise ValueError(f"--runs {str(self.path)!r} has another {', '.join(sorted(unlike))}: give another file.")

    @cached_property
    def subject(self) -> Subject:
        return Subject.of(self.options)

    def plan(self) -> Iterator[tuple[str, int, int]]:
        """Yields method, bits and seed of each training."""
        for seed, method in product(self.options.seeds, self.options.methods):
            lengths = self.options.bits if method == "two_sided" else [max(self.options.bits)]
            yield from ((method, bits, seed) for bits in lengths)

    def run(self, method: str, bits: int, seed: int) -> dict[str, Any]:
        """Trains and measures one mark."""
        subject, key = self.subject, key_of(bits, seed)
        if method == "full":
            config = config_of(self.options, bits, seed, learning_rate=self.options.full_rate)
            mark = train_full(subject, subject.vae, key, config)
        else:
            config = config_of(self.options, bits, seed, **LORAS[method])
            mark = train_lora(subject, subject.vae, key, config)
        result = measure(subject, mark, bits, seed)
        return result if method == "full" else {**result, "attacks": attack(subject, mark, bits, seed)}

    def run_missing(self) -> list[str]:
        """Runs the trainings without a stored result; returns the errors."""
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
                print(f"{name}: {line(self.record['runs'][name])}, {seconds:.0f} s in total", flush=True)
        return mistakes


def line(run: dict[str, Any]) -> str:
    """Summarizes a run."""
    return (
        f"{run['psnr']:.2f} dB, SSIM {run['ssim']:.4f}, {run['bit_accuracy']:.2%} of bits correct, "
        f"{run['seconds']:.1f} s of training"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        if options.docs:
            tables.write_docs(*options.docs)
            return 0
        benchmark = Benchmark(options)
        print(common.describe(benchmark.record["machine"]), flush=True)
        mistakes = benchmark.run_missing()
    except (ValueError, SettingError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(mistakes))
    if mistakes:
        return 1
    names = [f"{method}/{bits}/{seed}" for method, bits, seed in benchmark.plan()]  # the file may have more
    runs = {name: benchmark.record["runs"][name] for name in names}
    result = {"benchmark": "watermark", **benchmark.record, "runs": runs}
    print(tables.all_tables(result))
    usual = common.result_path("watermark", result["machine"]["device"])
    path = options.json or (None if options.quick else usual)
    if path:
        common.write_json(path, result)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.watermark", description=__doc__.split("\n\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--quick", action="store_true", help="use a tiny random autoencoder; write no file unless --json is given")
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    add("--images", type=Path, default=CIFAR, help="images, in folders or a .zip file: train/CLASS/*.jpg, test/...")
    add("--taef2", type=Path, help="folder with the weights of TAEF2 (default PEFT_ZOO_TAEF2)")
    add("--bits", type=int, nargs="+", default=[48, 32, 16], help="message lengths (default 48 32 16)")
    known = (*LORAS, "full")
    add("--methods", nargs="+", choices=known, default=list(known), help="training methods (default all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of keys and trainings (default 0 1 2)")
    add("--size", type=int, default=64, help="image side in pixels (default 64)")
    add("--pictures", type=int, default=2048, help="training and calibration images (default 2048)")
    add("--held-out", type=int, default=512, help="held-out images, and images of the attacker (default 512 each)")
    add("--steps", type=int, default=1000, help="steps per training (default 1000)")
    add("--batch-size", type=int, default=4, help="images per step (default 4)")
    add("--num-filters", type=int, help="filters of the keyed decoder (default of the method)")
    add("--psnr-target", type=float, help="target PSNR in dB (default of the method)")
    add("--bit-target", type=float, help="target bit accuracy (default of the method)")
    add("--learning-rate", type=float, help="learning rate of a LoRA (default of the method)")
    add("--full-rate", type=float, default=5e-4, help="learning rate of the full decoder (default 5e-4)")
    add("--runs", type=Path, help="file of finished runs (default runs/watermark_<device>.json)")
    add("--json", type=Path, help="result file (default benchmarks/results/watermark_<device>.json)")
    page = "only write the tables of a saved result to the method's page; further results add their keys, without times"
    add("--docs", type=Path, metavar="JSON", nargs="+", help=page)
    parser.set_defaults(**(QUICK if "--quick" in (sys.argv if arguments is None else arguments) else {}))
    options = parser.parse_args(arguments)
    options.bits = sorted(set(options.bits), reverse=True)
    if not options.quick and not options.runs:
        options.runs = common.ROOT / "runs" / f"watermark_{options.device}.json"
    return options
