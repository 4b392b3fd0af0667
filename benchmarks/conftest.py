"""What the benchmarks share: the networks, a search in the middle of its way, and how long to measure."""

from typing import Any

import pytest
import torch

from benchmarks.harness import THREADS, facts, keep_freed_memory
from benchmarks.searches import Search
from benchmarks.shapes import NETWORKS, TINY, Shape


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny networks and few rounds: a rehearsal")


def _networks(config: pytest.Config) -> dict[str, list[Shape]]:
    return TINY if config.getoption("--quick") else NETWORKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mid_search" in metafunc.fixturenames:
        networks = _networks(metafunc.config)
        metafunc.parametrize("mid_search", networks.values(), ids=networks, indirect=True, scope="session")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["environment"] = facts()
    machine_info["networks"] = list(_networks(config))
    machine_info["command"] = "python -m benchmarks" + (" --quick" if config.getoption("--quick") else "")


def pytest_configure(config: pytest.Config) -> None:
    # A rehearsal measures nothing, and one thread is not slowed down by whoever else computes.
    torch.set_num_threads(1 if config.getoption("--quick") else THREADS)
    keep_freed_memory()


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
