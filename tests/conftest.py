import os
from collections.abc import Callable, Iterator

# Threads that wait by spinning take the processor from those they wait for when other programs use it too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings
from torch import nn

# The same examples in every run; the first one of a test may build or compile, so no example has a deadline.
settings.register_profile("jackpot", deadline=None, derandomize=True)
settings.load_profile("jackpot")

# Where there is no device, the Triton kernels are checked in Triton's interpreter; it is chosen as they load.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)
# Memory that an operator allocates and forgets to write reads as NaN.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shard() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """A function that makes a model's parameters DTensors in place, as FSDP2 and tensor parallelism do."""
    from torch import distributed
    from torch.distributed.tensor import distribute_module, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda model: distribute_module(model, mesh)
    distributed.destroy_process_group()
