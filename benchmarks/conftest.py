"""What the benchmarks share: the networks, a search in the middle of its way, and how long to measure."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import THREADS
from benchmarks.searches import Search
from benchmarks.shapes import NETWORKS, TINY
from jackpot_kernels.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny networks and few rounds: a rehearsal")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mid_search" in metafunc.fixturenames:
        networks = TINY if metafunc.config.getoption("--quick") else NETWORKS
        metafunc.parametrize("mid_search", networks.values(), ids=networks, indirect=True, scope="session")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["environment"] = environment()
    machine_info["quick"] = config.getoption("--quick")


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def budget_s(quick: bool) -> float:
    """Seconds that one contest may take."""
    return 0.0 if quick else 10.0


@pytest.fixture(scope="session")
def mid_search(request: pytest.FixtureRequest) -> Search:
    return Search(request.param)


@pytest.fixture
def search(mid_search: Search) -> Search:
    """A search of its own for each benchmark."""
    return mid_search.fork()
