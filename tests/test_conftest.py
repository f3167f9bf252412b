"""The promises that conftest.py makes to every test."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_the_network_is_out_of_reach(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as outgoing, pytest.raises(RuntimeError, match="must not use the network"):
        outgoing.connect(address)


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_starts_from_the_same_random_state(time: str) -> None:
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


@given(st.integers())
def test_hypothesis_accepts_the_fixtures(number: int) -> None:
    assert number == int(str(number))


def test_the_hub_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.gpu
def test_a_gpu_test_runs_only_where_there_is_a_gpu() -> None:
    assert torch.ones(1, device="cuda").item() == 1


@pytest.mark.full
def test_a_full_test_runs_only_with_its_option(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("--full")
