"""Two processes must train what one process trains: with DDP, FSDP2 and both kinds of FSDP1, on the CPU with gloo.

Everything is run once, in `runs`; the tests look at what the processes wrote down.
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

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SOURCE = Path(__file__).parents[2] / "src"
PARALLEL = ["ddp", *worker.FSDP]
# The processes add up their gradients in another order, which moves the last bit of a loss near 5 (by 5e-7) and, by way
# of Adam, of a parameter near 1. Mistakes show far above it: importance that is not added up over shards, by 5e-2.
LOSS, PARAMETER = 1e-5, 1e-5


@dataclass
class Runs:
    """What the launched processes left in a folder, and what they said in case it is not there."""

    folder: Path
    log: str

    def read(self, mode: str, run: str, rank: int = 0) -> dict[str, Any]:
        """Losses and budgets of every step."""
        path = self.folder / mode / f"{run}.rank{rank}.json"
        assert path.exists(), f"{mode}: {run} did not finish\n{self.log[-8000:]}"
        return json.loads(path.read_text())

    def adapter(self, mode: str, file: str) -> dict[str, Tensor]:
        """The saved adapter."""
        return load_file(self.folder / mode / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Launch one process and two, side by side, on everything."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [sys.executable, worker.__file__, str(folder), "single"]
    # With `--cpu` accelerate leaves it to MPI to start the second process; with `--multi_gpu` torchrun does.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    settings = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    together = [*launcher, *settings, worker.__file__, str(folder), *PARALLEL]
    with ThreadPoolExecutor() as pool:
        return Runs(folder, "\n".join(pool.map(output_of, (alone, together))))


def output_of(command: list[str]) -> str:
    """Run a command on the CPU, one thread a process and without network; its failure shows in what it leaves out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "FSDP"))}
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env=environment, timeout=600, check=False, **both).stdout


@pytest.mark.parametrize(
    ("mode", "case"),
    [(mode, case) for mode in PARALLEL for case in worker.cases() if mode == "ddp" or case not in worker.DDP_ONLY],
)
def test_two_processes_train_what_one_trains(runs: Runs, mode: str, case: str) -> None:
    one, two = runs.read("single", case), runs.read(mode, case)
    assert max(one["losses"]) - min(one["losses"]) > 0.1, "nothing was learned, so equal losses would mean nothing"
    assert two["losses"] == pytest.approx(one["losses"], abs=LOSS)
    assert_same_adapter(runs.adapter(mode, f"{case}.safetensors"), runs.adapter("single", f"{case}.safetensors"))


@pytest.mark.parametrize("mode", PARALLEL)
def test_both_ranks_have_the_budget_of_one_process(runs: Runs, mode: str) -> None:
    one, first, second = runs.read("single", "snella"), runs.read(mode, "snella", 0), runs.read(mode, "snella", 1)
    assert first["budgets"] == second["budgets"] == one["budgets"]
    assert_competed(one["budgets"])


def test_replicas_are_squeezed_to_the_same_bits(runs: Runs) -> None:
    one, first, second = runs.read("single", "squeeze"), runs.read("ddp", "squeeze", 0), runs.read("ddp", "squeeze", 1)
    assert first["budgets"] == second["budgets"] == one["budgets"]
    assert set(one["budgets"][-1]) == {2} and set(one["budgets"][0]) == {8}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_trainer_with_two_processes_equals_one(runs: Runs, mode: str) -> None:
    one, first, second = runs.read("single", "trainer"), runs.read(mode, "trainer", 0), runs.read(mode, "trainer", 1)
    assert first["losses"] == pytest.approx(one["losses"], abs=LOSS)
    assert first["budgets"] == second["budgets"] == one["budgets"]
    assert_competed(one["budgets"])
    file = "whole/adapter_model.safetensors"
    assert_same_adapter(runs.adapter(mode, file), runs.adapter("single", file))


@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_resumed_training_allocates_as_if_never_interrupted(runs: Runs, mode: str) -> None:
    whole, resumed = runs.read(mode, "trainer"), runs.read(mode, "trainer_resumed")
    assert resumed["budgets"] == whole["budgets"][worker.MIDDLE :]
    assert resumed["budgets"][0] != whole["budgets"][worker.MIDDLE - 1], "nothing was allocated after the resumption"
    resumed_adapter = runs.adapter(mode, "resumed/adapter_model.safetensors")
    whole_adapter = runs.adapter(mode, "whole/adapter_model.safetensors")
    assert resumed_adapter.keys() == whole_adapter.keys()
    assert all(torch.equal(tensor, whole_adapter[name]) for name, tensor in resumed_adapter.items())


def assert_same_adapter(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names, dtypes and shapes, and values equal but for the order of additions."""
    assert one
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=PARAMETER, msg=lambda text, n=name: f"{n}: {text}")


def assert_competed(budgets: list[list[int]]) -> None:
    """The budget shrank, layers of one size got different shares of it, and the last steps left it alone."""
    assert sum(budgets[-1]) < sum(budgets[0])
    assert budgets[-1][0] != budgets[-1][3]  # q_proj of the two layers
    assert budgets[-1] == budgets[-2]
