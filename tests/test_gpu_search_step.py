"""The search step on a device: the bits of the CPU, in graphs or not, without waiting and without growing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.shapes import TINY, Shape, resnet32
from jackpot_kernels.search import GraphedStep

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent


class Search:
    """SRPopup over bare layers, whose gradients come from a generator and are the same on every device."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str,
        steps: int,
        dtype: torch.dtype = torch.float32,
        **how: object,
    ) -> None:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
            if len(shape) == 4
            else nn.Linear(*shape[::-1])
            for shape in shapes
        ]
        model = jk.convert(nn.Sequential(*layers))
        jk.initialize(model, 0.9, keep_last_dense=False)
        self.model = model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        self.layers = list(jk.masked_layers(self.model).values())
        for layer in self.layers:
            layer.effective_weight()
            layer.scores.grad = torch.zeros_like(layer.scores)
        self.optimizer = jk.SRPopup(self.model, total_steps=steps, **how)
        self.generator = torch.Generator().manual_seed(1)

    def draw_gradients(self, bad: bool = False) -> None:
        for layer in self.layers:
            gradient = 0.01 * torch.randn(layer.scores.shape, generator=self.generator)
            layer.scores.grad.copy_(gradient)
        if bad:
            self.layers[-1].scores.grad.view(-1)[0] = float("inf")

    def state(self) -> list[Tensor]:
        """All that a step writes, on the CPU."""
        momenta = [self.optimizer.state[layer.scores]["momentum_buffer"] for layer in self.layers]
        tensors = [t for layer in self.layers for t in (layer.scores.detach(), layer.mask_words)]
        effective = [layer.effective_weight() for layer in self.layers]
        return [t.cpu() for t in (*tensors, *momenta, *effective, self.optimizer._search["control"])]


@pytest.mark.parametrize(
    "how", [{}, {"scope": "global"}, {"pairs": "random"}, {"final_sparsity": 0.95}], ids=str
)
def test_a_search_of_resnet32_has_the_bits_of_the_cpu(how: dict[str, object]) -> None:
    steps = 200 if not how else 40
    ours, wanted = (Search(resnet32(), device, steps, **how) for device in ("cuda", "cpu"))
    for t in range(steps):
        for search in (ours, wanted):
            search.draw_gradients(bad=t == 11)
            search.optimizer.step()
        if t % 10 == 0 or t == steps - 1:
            assert all(map(torch.equal, ours.state(), wanted.state())), t
            assert torch.equal(ours.optimizer._stats[:, :4].cpu(), wanted.optimizer._stats[:, :4]), t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_effective_weights_of_any_dtype(dtype: torch.dtype) -> None:
    ours, wanted = (Search(TINY["tiny"], device, 20, dtype) for device in ("cuda", "cpu"))
    for _ in range(20):
        for search in (ours, wanted):
            search.draw_gradients()
            search.optimizer.step()
    assert all(map(torch.equal, ours.state(), wanted.state()))


@pytest.mark.parametrize("joint", [False, True])
def test_threshold_and_masks(joint: bool) -> None:
    values = [torch.randn(n).round(decimals=1) for n in (1, 1000, 300_001)]
    values[2][::7] = float("nan")
    num_kept = torch.tensor([150_000] if joint else [1, 10, 30_000])
    wanted = jk.threshold(values, num_kept, joint)
    got = jk.threshold([v.cuda() for v in values], num_kept.cuda(), joint)
    assert all(
        torch.equal(a.cpu().view(torch.int32), b.view(torch.int32)) for a, b in zip(got, wanted, strict=True)
    )
    for value in values:
        words = jk.pack_mask((value > 0).cuda())
        assert torch.equal(words.cpu(), jk.pack_mask(value > 0))
        assert torch.equal(jk.unpack_mask(words, value.shape).cpu(), value > 0)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    model = jk.convert(model)
    jk.initialize(model, 0.8)
    return model.cuda()


def graphed_search(warm_up: int, scaled: bool) -> tuple[list[Tensor], GraphedStep]:
    """All states and losses of a search of 100 steps, whose fifth batch is smaller."""
    model = network()
    optimizer = jk.SRPopup(model, total_steps=100)
    scaler = torch.amp.GradScaler("cuda") if scaled else None
    step = GraphedStep(optimizer, lambda x, y: nn.functional.cross_entropy(model(x), y), scaler, warm_up)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for t in range(100):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t // 10)
        x = torch.randn(20 if t == 5 else 32, 3, 8, 8, generator=generator).cuda()
        losses.append(step(x, torch.arange(len(x)).cuda() % 10))
    return [*model.state_dict().values(), *losses, optimizer._search["control"]], step


@pytest.mark.parametrize("scaled", [False, True])
def test_replays_have_the_bits_of_steps_without_a_graph(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    wanted, plain = graphed_search(1000, scaled)
    assert plain._graph is None
    for _ in range(2):
        got, graphed = graphed_search(3, scaled)
        assert graphed._graph is not None
        assert all(map(torch.equal, got, wanted))


def test_waits_for_nothing() -> None:
    search = Search(resnet32(), "cuda", 20)
    search.draw_gradients()
    search.optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            search.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow() -> None:
    search = Search(resnet32(), "cuda", 1100)
    search.draw_gradients()
    for _ in range(10):
        search.optimizer.step()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        search.optimizer.step()
    assert torch.cuda.memory_allocated() == allocated and torch.cuda.memory_reserved() == reserved


def small_search() -> None:
    """What runs under compute-sanitizer: hot, cold, joint and skipped steps of a few layers."""
    for scope in ("layer", "global"):
        search = Search(TINY["tiny"], "cuda", 12, scope=scope)
        for t in range(12):
            search.draw_gradients(bad=t == 5)
            search.optimizer.step()
    values = [torch.randn(5000, device="cuda")]
    jk.threshold(values, torch.tensor([70], device="cuda"))
    torch.cuda.synchronize()


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    script = "import sys; sys.path[:0] = ['.', 'tests']; import test_gpu_search_step as t; t.small_search()"
    # Torch asks the driver for functions that it may lack, which is no error; and each tensor gets an
    # allocation of its own, so that a step past its end is noticed.
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    answer = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
