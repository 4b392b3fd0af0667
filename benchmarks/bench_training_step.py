"""The training step of ResNet-32 of double width under search: forward, backward, ``SRPopup.step``."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.checks import require_close
from benchmarks.harness import MAX_ROUNDS, TWINS, Call, contest, in_turn
from benchmarks.searches import LR, MOMENTUM, SPARSITY, WEIGHT_DECAY
from benchmarks.shapes import TRAINED
from jackpot_kernels.convert import searched_layers
from jackpot_kernels.models import resnet32


@pytest.mark.parametrize("network", [TRAINED])
def bench_training_step(benchmark: BenchmarkFixture, network: str, quick: bool, budget_s: float) -> None:
    """Against the same network trained densely by ``torch.optim.SGD``, fused and foreach."""
    torch.manual_seed(0)
    batch = 4 if quick else 64
    x, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    dense = resnet32(width=1 if quick else 2)
    searched = jk.convert(deepcopy(dense))
    jk.initialize(searched, SPARSITY)
    require_same_gradients(searched, x, labels)

    def step(like: nn.Module, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> Call:
        return in_turn([training_step(m := deepcopy(like), optimizer_of(m), x, labels) for _ in range(TWINS)])

    others = {f"{kind} SGD": step(dense, partial(_sgd, kind=kind)) for kind in ("fused", "foreach")}
    contest(benchmark, step(searched, _sr_popup), others, budget_s=8 * budget_s)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Call:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def _sr_popup(model: nn.Module) -> torch.optim.Optimizer:
    return jk.SRPopup(model, LR, MOMENTUM, WEIGHT_DECAY, total_steps=2 * MAX_ROUNDS)


def _sgd(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    switch: Mapping[str, bool] = {kind: True}
    return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, **switch)


def require_same_gradients(searched: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Check output and score gradients against a plain network that holds ``weight * mask`` (Eq. 6)."""
    twin, plain = deepcopy(searched), jk.finalize(deepcopy(searched)).requires_grad_()
    layers = searched_layers(twin)
    outputs, expected = twin(x), plain(x)
    require_close("output", [outputs], [expected])
    scores = [layer.scores for layer in layers.values()]
    weights = [plain.get_parameter(f"{name}.weight") for name in layers]
    got = torch.autograd.grad(F.cross_entropy(outputs, labels), scores)
    gradients = torch.autograd.grad(F.cross_entropy(expected, labels), weights)
    wanted = [g * layer.weight for g, layer in zip(gradients, layers.values(), strict=True)]
    require_close("score gradient", got, wanted)
