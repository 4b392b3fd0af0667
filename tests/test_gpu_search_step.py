"""The search step on a device: the bits of the CPU, in graphs or not, without waiting and without growing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import test_swap
import torch
from test_search_step import begin
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.shapes import TINY, Shape, resnet32
from jackpot_kernels.ops.swap import new_workspace
from jackpot_kernels.search import GraphedStep

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent


def shifted(tensor: Tensor, by: int) -> Tensor:
    """A copy that lies some elements behind aligned memory."""
    memory = torch.empty(tensor.numel() + by, device=tensor.device)
    return memory[by:].view(tensor.shape).copy_(tensor.detach())


class Search:
    """SRPopup over bare layers, whose gradients come from a generator and are the same on every device.

    Scores and gradients lie ``shift`` elements behind aligned memory.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str,
        steps: int,
        dtype: torch.dtype = torch.float32,
        shift: int = 0,
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
            layer.scores.data = shifted(layer.scores, shift)
            layer.scores.grad = shifted(torch.zeros_like(layer.scores), shift)
        self.optimizer = jk.SRPopup(self.model, total_steps=steps, **how)
        self.generator = torch.Generator().manual_seed(1)

    def drawn(self, bad: bool = False) -> list[Tensor]:
        gradients = [0.01 * torch.randn(s.scores.shape, generator=self.generator) for s in self.layers]
        if bad:
            gradients[-1].view(-1)[0] = float("inf")
        return gradients

    def draw_gradients(self, bad: bool = False) -> None:
        for layer, gradient in zip(self.layers, self.drawn(bad), strict=True):
            layer.scores.grad.copy_(gradient)

    def state(self) -> list[Tensor]:
        """All that a step writes, on the CPU."""
        momenta = [self.optimizer.state[layer.scores]["momentum_buffer"] for layer in self.layers]
        tensors = [t for layer in self.layers for t in (layer.scores.detach(), layer.mask_words)]
        effective = [layer.effective_weight() for layer in self.layers]
        return [t.cpu() for t in (*tensors, *momenta, *effective, self.optimizer._search["control"])]


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


# More than the 256 layers of a launch, where the scope allows it; tiles that are whole but misaligned.
@pytest.mark.parametrize(
    ("shapes", "how"),
    [
        ([(12, 7)] * 300, {}),
        ([(12, 7)] * 256, {"scope": "global"}),
        ([(64, 32, 3, 3), (10, 77)], {"shift": 1}),
        ([(64, 32, 3, 3), (10, 77)], {"shift": 1, "scope": "global"}),
    ],
    ids=["300 layers", "256 layers, global", "misaligned", "misaligned, global"],
)
def test_many_layers_and_misaligned_ones(shapes: list[Shape], how: dict[str, object]) -> None:
    ours, wanted = (Search(shapes, device, 20, **how) for device in ("cuda", "cpu"))
    for t in range(20):
        for search in (ours, wanted):
            search.draw_gradients(bad=t == 11)
            search.optimizer.step()
        assert all(map(torch.equal, ours.state(), wanted.state())), t
        assert torch.equal(ours.optimizer._stats[:, :4].cpu(), wanted.optimizer._stats[:, :4]), t


def bare_search(joint: bool, steps: int) -> test_swap.Search:
    """The search that the tests of the operators take, on the device."""
    search = test_swap.Search(joint, steps)
    for name, value in dict(vars(search)).items():
        if isinstance(value, list):
            setattr(search, name, [tensor.cuda() for tensor in value])
        elif isinstance(value, Tensor):
            setattr(search, name, value.cuda())
    search.workspace = new_workspace(search.scores, joint)
    return search


@pytest.mark.parametrize("joint", [False, True])
def test_the_step_as_one_operator(joint: bool) -> None:
    ours, wanted = bare_search(joint, 30), test_swap.Search(joint, 30)
    step, wanted_step = begin(ours), begin(wanted)
    for t in range(30):
        grads = [0.01 * torch.randn(s.shape) for s in wanted.scores]
        if t == 5:
            grads[4] = torch.empty(0)
        if t == 7:
            grads[2].view(-1)[5] = float("nan")
        found_inf = torch.tensor(float(t == 9))
        step([grad.cuda() for grad in grads], found_inf.cuda())
        wanted_step(grads, found_inf)
        assert torch.equal(step.stats[:, :4].cpu(), wanted_step.stats[:, :4]), t
        for name in ("scores", "momenta", "words", "effective"):
            same = map(torch.equal, [tensor.cpu() for tensor in getattr(ours, name)], getattr(wanted, name))
            assert all(same), (t, name)
    assert ours.control.tolist() == wanted.control.tolist() == [28, 2, 0]


def test_memory_that_no_longer_fits_changes_nothing() -> None:
    """What only the swap needs is looked at before the update is launched."""
    search, before = bare_search(False, 5), bare_search(False, 5)
    step = begin(search)
    search.num_kept.resize_(1, 2)
    with pytest.raises(RuntimeError, match="num_kept must be"):
        step([torch.ones_like(score) for score in search.scores])
    for name in ("scores", "momenta", "words", "effective"):
        assert all(map(torch.equal, getattr(search, name), getattr(before, name))), name
    assert search.control.tolist() == [0, 0, 0]


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


def graphed_search(
    warm_up: int, scaled: bool, reload_at: int | None = None
) -> tuple[list[Tensor], GraphedStep]:
    """All states and losses of a search of 100 steps, whose fifth batch is smaller."""
    model = network()
    optimizer = jk.SRPopup(model, total_steps=100)
    scaler = torch.amp.GradScaler("cuda") if scaled else None
    step = GraphedStep(optimizer, lambda x, y: nn.functional.cross_entropy(model(x), y), scaler, warm_up)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for t in range(100):
        if t == reload_at:
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
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


def test_a_graphed_search_goes_on_after_load_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    wanted, _ = graphed_search(3, False)
    got, step = graphed_search(3, False, reload_at=50)
    assert step._graph is not None
    assert all(map(torch.equal, got, wanted))


def two_graphs(warm_up: int) -> tuple[list[Tensor], list[GraphedStep]]:
    """The state after a search with two shapes of inputs, tested now and then in another dtype."""
    model = network()
    optimizer = jk.SRPopup(model, total_steps=60)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return nn.functional.cross_entropy(model(x), y)

    steps = [GraphedStep(optimizer, loss, None, warm_up) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    for t in range(60):
        x = torch.randn(32 if t % 2 else 16, 3, 8, 8, generator=generator).cuda()
        steps[t % 2](x, torch.arange(len(x)).cuda() % 10)
        if t % 20 == 15:
            with torch.no_grad():
                model(x)
    return [*model.state_dict().values(), optimizer._search["control"]], steps


def test_two_graphs_of_one_search_read_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    wanted, _ = two_graphs(1000)
    got, steps = two_graphs(3)
    assert all(step._graph is not None for step in steps)
    assert all(map(torch.equal, got, wanted))


def test_a_scaler_in_a_graph_skips_infinite_steps() -> None:
    steps, bad = 20, (2, 9, 10)
    ours, wanted = (Search(TINY["tiny"], device, steps) for device in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=5)

    def loss(*gradients: Tensor) -> Tensor:
        pairs = zip(ours.layers, gradients, strict=True)
        return torch.stack([(layer.scores * gradient).sum() for layer, gradient in pairs]).sum()

    step = GraphedStep(ours.optimizer, loss, scaler)
    for t in range(steps):
        gradients = [gradient.cuda() for gradient in ours.drawn(bad=t in bad)]
        with waiting_for_nothing() if step._graph else nullcontext():
            step(*gradients)
        wanted.draw_gradients(bad=t in bad)
        wanted.optimizer.step()
    assert step._graph is not None
    assert all(map(torch.equal, ours.state(), wanted.state()))
    assert wanted.optimizer.skipped_steps == len(bad)
    # Doubled after the steps 7 and 15, halved at the bad ones.
    assert scaler.get_scale() == 2.0**9


def test_waits_for_nothing() -> None:
    search = Search(resnet32(), "cuda", 20)
    search.draw_gradients()
    search.optimizer.step()
    with waiting_for_nothing():
        for _ in range(5):
            search.optimizer.step()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_changing_learning_rate_waits_for_nothing(on_device: bool) -> None:
    searches = []
    for device in ("cuda", "cpu"):
        lr = torch.tensor(0.1, device=device) if on_device else 0.1
        search = Search(TINY["tiny"], device, 20, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(search.optimizer, 20)
        for t in range(20):
            search.draw_gradients()
            with waiting_for_nothing() if t else nullcontext():
                search.optimizer.step()
                if on_device:
                    lr.mul_(0.9)
                else:
                    scheduler.step()
        searches.append(search)
    ours, wanted = searches
    assert all(map(torch.equal, ours.state(), wanted.state()))


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
    """What runs under compute-sanitizer: hot, cold, joint and skipped steps of a few layers, one of them of
    whole tiles.
    """
    for scope in ("layer", "global"):
        search = Search([*TINY["tiny"], (64, 64, 3, 3)], "cuda", 12, scope=scope)
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
