"""Two processes train what one process trains: with DDP, FSDP2 and both kinds of FSDP1, on the CPU with gloo.

The fixture `runs` launches everything once; the tests compare the results that the processes wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("accelerate", reason="needs accelerate, which launches the processes")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from tests.distributed import worker
from tests.distributed.cases import MIDDLE, cases, quick

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CASES = cases()
PARALLEL = ["ddp", *worker.FSDP]
# Processes sum their gradients in another order, which changes the last bit of a loss near 5 (by 5e-7) and, through
# Adam, of a parameter near 1. Mistakes are far larger: importance that is not summed over shards, 5e-2.
LOSS, PARAMETER = 1e-5, 1e-5


@dataclass
class Runs:
    """The folder with the results of the launched processes, and their output."""

    folder: Path
    log: str

    def read(self, mode: str, run: str, rank: int = 0) -> dict[str, Any]:
        """Losses and budgets of each step."""
        path = self.folder / mode / f"{run}.rank{rank}.json"
        assert path.exists(), f"{mode}: {run} did not finish\n{self.log[-8000:]}"
        return json.loads(path.read_text())

    def adapter(self, mode: str, file: str) -> dict[str, Tensor]:
        """The saved adapter."""
        return load_file(self.folder / mode / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """Launches one process and a group of two, each for all of its runs."""
    extent = "full" if request.config.getoption("--full") else "quick"
    folder = tmp_path_factory.mktemp("runs")
    alone = [sys.executable, worker.__file__, str(folder), extent, "single"]
    # With `--cpu` accelerate leaves it to MPI to start the second process; with `--multi_gpu` torchrun does.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    settings = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    together = [*launcher, *settings, worker.__file__, str(folder), extent, *PARALLEL]
    with ThreadPoolExecutor() as pool:
        return Runs(folder, "\n".join(pool.map(output_of, (alone, together))))


def output_of(command: list[str]) -> str:
    """Runs a command on the CPU with one thread and without network; a failure shows in missing results."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "FSDP"))}
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env=environment, timeout=600, check=False, **both).stdout


@pytest.mark.parametrize(
    ("mode", "case"),
    [
        pytest.param(mode, name, marks=[] if quick(mode, name) else [pytest.mark.full])
        for mode in PARALLEL
        for name, case in CASES.items()
        if case.fsdp or mode not in worker.FSDP
    ],
)
def test_two_processes_train_what_one_trains(runs: Runs, mode: str, case: str) -> None:
    one, first, second = runs.read("single", case), runs.read(mode, case, 0), runs.read(mode, case, 1)
    assert max(one["losses"]) - min(one["losses"]) > 0.1, "nothing was learned, so equal losses would mean nothing"
    assert first["losses"] == pytest.approx(one["losses"], abs=LOSS)
    assert first["budgets"] == second["budgets"] == one["budgets"]
    CASES[case].check(one["budgets"])
    assert_same_adapter(runs.adapter(mode, f"{case}.safetensors"), runs.adapter("single", f"{case}.safetensors"))


with_trainer = pytest.mark.parametrize("case", [f"{name}_trainer" for name, case in CASES.items() if case.trainer])


@with_trainer
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_trainer_with_two_processes_equals_one(runs: Runs, mode: str, case: str) -> None:
    one, first, second = runs.read("single", case), runs.read(mode, case, 0), runs.read(mode, case, 1)
    assert first["losses"] == pytest.approx(one["losses"], abs=LOSS)
    assert first["budgets"] == second["budgets"] == one["budgets"]
    CASES[case.removesuffix("_trainer")].check(one["budgets"])
    file = f"{case}/whole/adapter_model.safetensors"
    assert_same_adapter(runs.adapter(mode, file), runs.adapter("single", file))


@with_trainer
@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_resumed_training_equals_uninterrupted_training(runs: Runs, mode: str, case: str) -> None:
    whole, resumed = runs.read(mode, case), runs.read(mode, f"{case}_resumed")
    assert resumed["budgets"] == whole["budgets"][MIDDLE:]
    assert resumed["budgets"][0] != whole["budgets"][MIDDLE - 1], "nothing was allocated after the resumption"
    resumed_adapter = runs.adapter(mode, f"{case}/resumed/adapter_model.safetensors")
    whole_adapter = runs.adapter(mode, f"{case}/whole/adapter_model.safetensors")
    assert resumed_adapter.keys() == whole_adapter.keys()
    assert all(torch.equal(tensor, whole_adapter[name]) for name, tensor in resumed_adapter.items())


def assert_same_adapter(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names, dtypes and shapes, and values equal but for the order of additions."""
    assert one
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=PARAMETER, msg=lambda text, n=name: f"{n}: {text}")
