"""The CUDA kernels, compiled as C++ and run on the host under ASan and UBSan, against the CPU's bits."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_swap import KINDS, draw_mask, draw_scores, jump
from torch import Tensor

from jackpot_kernels import pack_mask, swap_, threshold
from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import PAIRS, new_workspace

ROOT = Path(__file__).parent.parent
HOST = ROOT / "tests" / "cuda_host"
SOURCES = (*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(HOST.glob("*.cpp")))
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{HOST}"),
    # CUDA reads memory by any type, and fuses only what says so.
    *("-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/cuda/tables.h

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@dataclass(frozen=True)
class Launch:
    """Blocks, threads and layers of a launch (0: as on a device), and how the host runs them."""

    blocks: int = 0
    threads: int = 64
    layers: int = 0
    resident: int = 1
    backwards: bool = False

    def words(self) -> list[int]:
        return [self.blocks, self.threads, self.layers, self.resident, self.backwards]


# One block after the other; blocks by turns, their threads from the last; more launches than one.
LAUNCHES = (
    Launch(),
    Launch(blocks=3, resident=3, backwards=True),
    Launch(blocks=5, threads=128, layers=2, resident=2),
)


class Message:
    """What `replay` reads: numbers and arrays, one after the other."""

    def __init__(self, *numbers: int) -> None:
        self.parts: list[bytes] = []
        self.numbers(*numbers)

    def numbers(self, *values: int) -> None:
        self.parts.append(np.array(values, np.int64).tobytes())

    def array(self, values: Tensor | np.ndarray) -> None:
        content = raw(values) if isinstance(values, Tensor) else values.tobytes()
        self.numbers(len(content))
        self.parts.append(content)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements as they lie in memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.numel() else tensor.reshape(0)
    return flat.view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Message], bytes]:
    folder = tmp_path_factory.mktemp("cuda_host")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run(["g++", *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    program = folder / "replay"
    subprocess.run(["g++", "-fsanitize=address,undefined", *objects, "-o", program], check=True)

    def run(message: Message) -> bytes:
        (folder / "in").write_bytes(b"".join(message.parts))
        answer = subprocess.run([program, folder / "in", folder / "out"], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return (folder / "out").read_bytes()

    return run


@pytest.mark.parametrize("shift", [0, 1])
def test_pack_mask(replay: Callable[[Message], bytes], shift: int) -> None:
    masks = [torch.rand(n) < 0.5 for n in (1, 31, 32, 33, 64, 4097, 30_000)]
    masks.append(torch.arange(256, dtype=torch.uint8).view(torch.bool))  # any byte but 0 is true
    message = Message()
    for mask in masks:
        message.numbers(0, *Launch().words(), shift)
        message.array(mask)
    wanted = b"".join(raw(pack_mask(mask)) + raw(mask.view(torch.uint8) != 0) for mask in masks)
    assert replay(message) == wanted


# Three dimensions and the order in which they lie in memory, of the gradient and of the weight.
PRODUCTS = {
    "in a row": ((1, 1, 9001), (0, 1, 2), (0, 1, 2)),
    "channels_last": ((5, 150, 9), (0, 2, 1), (0, 2, 1)),
    "one channels_last": ((5, 33, 9), (0, 2, 1), (0, 1, 2)),
    "transposed": ((1, 130, 200), (0, 2, 1), (0, 1, 2)),
    "turned": ((7, 3, 65), (2, 1, 0), (1, 2, 0)),
}


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("launch", LAUNCHES[:2], ids=str)
@pytest.mark.parametrize("case", PRODUCTS)
def test_score_grad(replay: Callable[[Message], bytes], case: str, launch: Launch, shift: int) -> None:
    """Each dtype that a gradient or a weight may have, by torch's own rounding."""
    shape, *orders = PRODUCTS[case]
    message, wanted = Message(), b""
    dtypes = [DTYPES.index(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for of_grad, of_weight in product(dtypes, dtypes):
        grad, weight = (
            torch.randn([shape[i] for i in order])
            .to(DTYPES[dtype])
            .permute([order.index(i) for i in range(3)])
            for order, dtype in zip(orders, (of_grad, of_weight), strict=True)
        )
        message.numbers(3, *launch.words(), of_grad, of_weight, shift)
        message.array(grad)
        message.array(weight)
        dims = [(shape[i], grad.stride(i), weight.stride(i)) for i in (2, 1, 0)]
        message.array(np.array(dims, np.int64))
        wanted += raw((grad.float() * weight.float()).contiguous())
    assert replay(message) == wanted


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_threshold(replay: Callable[[Message], bytes], launch: Launch, joint: bool) -> None:
    rng = np.random.default_rng(0)
    message, wanted = Message(), b""
    for kind in KINDS:
        values = [torch.from_numpy(draw_scores(rng, kind, n)) for n in (1, 100, 40_000, 999)]
        sizes = [sum(v.numel() for v in values)] if joint else [v.numel() for v in values]
        num_kept = torch.tensor([int(rng.integers(1, n + 1)) for n in sizes])
        message.numbers(1, *launch.words(), joint, len(values))
        for value in values:
            message.array(value)
        message.array(num_kept)
        wanted += b"".join(map(raw, threshold(values, num_kept, joint)))
    assert replay(message) == wanted


@dataclass
class Search:
    """A search that the CPU's operators run here and `replay` runs again."""

    scores: list[Tensor]
    masks: list[Tensor]
    grads: list[list[Tensor]]  # of each step and layer, an empty one where none came
    last: list[int] | None = None
    joint: bool = False
    pairs: str = "best"
    seed: int = 0
    shift: int = 0  # of scores and momenta against their alignment
    with_workspace: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    rates: float | Sequence[float] | None = None
    found_inf: Sequence[float] = ()
    hyper: tuple[float, ...] = (0.1, 0.9, 5e-4, 0, 1)
    cold: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(s.shape, generator=generator).to(self.weight_dtype) for s in self.scores]
        self.weights = [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
        self.words = [pack_mask(mask) for mask in self.masks]
        pairs = zip(self.weights, self.words, strict=True)
        self.effective = [effective_weight(w, words, self.dtype) for w, words in pairs]
        # One layer has strides of its own for weight and effective weight, one has none.
        self.effective[0] = self.effective[0].contiguous()
        if len(self.effective) > 2:
            self.effective[2] = torch.empty(0)
        kept = torch.stack([mask.sum() for mask in self.masks])
        kept = kept.sum().view(1) if self.joint else kept
        last = kept if self.last is None else torch.tensor(self.last)
        self.num_kept = torch.stack([kept, last], 1)
        total = len(self.grads)
        u = torch.arange(1, total + 1, dtype=torch.float64) / total
        rates = (1 - u) ** 4 if self.rates is None else torch.tensor(self.rates, dtype=torch.float64)
        rates = rates.expand(total)
        self.schedule = torch.stack([rates, (1 - 2 * u).clamp(min=0) ** 3], 1)
        self.rows = torch.tensor([self.hyper] * len(self.scores))
        self.rows[-1, 0] *= 0.5  # a learning rate of its own

    def message(self, launch: Launch) -> Message:
        message = Message(
            2, *launch.words(), self.joint, self.with_workspace, PAIRS.index(self.pairs), self.seed
        )
        message.numbers(len(self.scores))
        for scores, words, weight, effective in zip(
            self.scores, self.words, self.weights, self.effective, strict=True
        ):
            message.numbers(self.shift)
            message.array(scores)
            message.array(torch.zeros_like(scores))
            message.array(words)
            message.numbers(DTYPES.index(weight.dtype), DTYPES.index(effective.dtype))
            message.array(weight)
            message.array(effective)
            strides = effective.stride() if effective.numel() else weight.stride()
            dims = zip(weight.shape, weight.stride(), strides, strict=True)
            message.array(np.array(list(dims), np.int64))
        for tensor in (self.num_kept, torch.zeros(3, dtype=torch.int64), self.schedule):
            message.array(tensor)
        message.numbers(len(self.grads))
        for t, grads in enumerate(self.grads):
            message.array(self.rows)
            message.array(torch.tensor(self.found_inf[t : t + 1], dtype=torch.float32))
            for grad in grads:
                message.array(grad)
        return message

    def states(self) -> list[bytes]:
        """What the CPU's operators leave after each step, in the order in which `replay` writes it."""
        momenta = [torch.zeros_like(s) for s in self.scores]
        control = torch.zeros(3, dtype=torch.int64)
        how = {"workspace": new_workspace(self.scores, self.joint), "joint": self.joint}
        states = []
        for t, grads in enumerate(self.grads):
            found_inf = torch.tensor(self.found_inf[t]) if self.found_inf else None
            score_update_(
                self.scores, momenta, grads, self.words, self.rows, control, found_inf=found_inf, **how
            )
            patched = {"weights": self.weights, "effective": self.effective}
            settings = (self.num_kept, self.schedule, control)
            choice = {"pairs": self.pairs, "seed": self.seed}
            stats = swap_(self.scores, self.words, *settings, **patched, **choice, **how)
            layers = zip(self.scores, momenta, self.words, self.effective, strict=True)
            states += [raw(control), raw(stats), *(raw(tensor) for layer in layers for tensor in layer)]
        return states


def run_search(replay: Callable[[Message], bytes], search: Search, launch: Launch) -> int:
    """Compare step by step; return how many swaps of the kernels scanned the scores."""
    answer = replay(search.message(launch))
    at = cold = 0
    for i, state in enumerate(search.states()):
        got, at = answer[at : at + len(state)], at + len(state)
        if i % (2 + 4 * len(search.scores)) == 1:  # stats, of which the way taken is each one's own
            rows = np.frombuffer(got, np.int64).reshape(-1, 5)
            cold += int(rows[:, 4].sum())
            assert np.array_equal(rows[:, :4], np.frombuffer(state, np.int64).reshape(-1, 5)[:, :4]), i
        else:
            assert got == state, i
    assert at == len(answer)
    return cold


def five_layers(steps: int, noise: float = 0.01, **how: object) -> Search:
    shapes = ((32, 3, 3, 3), (1, 1), (50, 333), (17,), (32, 16, 3, 3))
    masks = [torch.rand(shape) < 0.1 for shape in shapes]
    for mask in masks:
        mask.view(-1)[0] = True
    scores = [torch.where(mask, 1.0, 0.99) for mask in masks]
    grads = [[noise * torch.randn(shape) for shape in shapes] for _ in range(steps)]
    kept = [int(mask.sum()) for mask in masks]
    last = [(sum(kept) + 1) // 2] if how.get("joint") else [(k + 1) // 2 for k in kept]
    return Search(scores, masks, grads, last, **how)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_a_search_has_the_bits_of_the_cpu(
    replay: Callable[[Message], bytes], launch: Launch, joint: bool
) -> None:
    search = five_layers(24, joint=joint)
    search.grads[7][2].view(-1)[5] = float("nan")
    search.grads[9][4] = torch.empty(0)
    cold = run_search(replay, search, launch)
    segments = 1 if joint else 5
    # Both ways were taken: the first step has no window yet, and later ones find theirs.
    assert segments <= cold < 0.6 * 24 * segments


def test_a_search_with_the_usual_blocks_and_threads(replay: Callable[[Message], bytes]) -> None:
    run_search(replay, five_layers(3), Launch(threads=0))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_and_dtypes(replay: Callable[[Message], bytes], pairs: str, dtype: torch.dtype) -> None:
    search = five_layers(4, pairs=pairs, dtype=dtype, seed=2**62 + 3, shift=1, hyper=(0.1, 0.9, 5e-4, 1, 0.5))
    run_search(replay, search, Launch())


def test_narrow_weights(replay: Callable[[Message], bytes]) -> None:
    for dtype in DTYPES[1:]:
        run_search(replay, five_layers(3, weight_dtype=dtype), Launch())


def test_windows_that_miss(replay: Callable[[Message], bytes]) -> None:
    search = five_layers(16)
    for grads in search.grads:
        shift = 5 * torch.randn(())  # all scores move together, away from where the window was aimed
        for grad in grads:
            grad += shift
    assert run_search(replay, search, Launch()) > 10


@pytest.mark.parametrize("joint", [False, True])
def test_ties_and_lists_that_overflow(replay: Callable[[Message], bytes], joint: bool) -> None:
    search = five_layers(8, joint=joint)
    search.grads = [[(100 * grad).round() / 100 for grad in grads] for grads in search.grads]
    search.grads[3] = [torch.zeros_like(grad) for grad in search.grads[3]]
    run_search(replay, search, Launch())
    large = torch.rand(40_000) < 0.5  # half of it crosses the threshold: more than a list can hold
    noise = [[torch.randn(40_000)] for _ in range(6)]
    scores = [torch.where(large, 1.0, 0.99)]
    assert run_search(replay, Search(scores, [large], noise, rates=1e-18), Launch()) >= 2


def test_lists_that_end_too_early(replay: Callable[[Message], bytes]) -> None:
    """Few swaps let the lists end near their first ranks; many that follow need what lies beyond."""
    numel, steps = 20_000, 24
    mask = torch.rand(numel) < 0.3
    scores = torch.where(mask, 1.0, 0.99) + 0.02 * torch.randn(numel)
    grads = [[0.002 * torch.randn(()) + 0.02 * torch.randn(numel)] for _ in range(steps)]
    rates = [1e-18, 1e-18, 0.05, 1e-18, 1e-18, 0.2, 1e-18, 0.1] * (steps // 8)
    search = Search([scores], [mask], grads, rates=rates, hyper=(0.1, 0.5, 0, 0, 1))
    assert run_search(replay, search, Launch()) < steps


@pytest.mark.parametrize("entering", [True, False])
def test_a_list_and_a_window_do_not_stand_for_what_lies_between(
    replay: Callable[[Message], bytes], entering: bool
) -> None:
    mask, before, after = jump(entering)
    grads = [[torch.zeros(8192)], [before - after]]
    search = Search([before], [mask], grads, rates=[0, 0.2], hyper=(2.0, 0, 0, 0, 1))
    assert run_search(replay, search, Launch()) == 2


def test_more_to_keep_than_is_kept(replay: Callable[[Message], bytes]) -> None:
    search = five_layers(3)
    search.num_kept += 100
    run_search(replay, search, Launch())


def test_a_window_full_of_equal_scores(replay: Callable[[Message], bytes]) -> None:
    """More than are compared with each other: positions alone tell them apart, in rounds of a digit."""
    numel, steps = 20_000, 6
    mask = torch.arange(numel) % 25 == 0
    search = Search([torch.where(mask, 1.0, 0.99)], [mask], [[torch.zeros(numel)]] * steps, last=[500])
    assert run_search(replay, search, Launch()) < steps - 1


def test_without_workspace(replay: Callable[[Message], bytes]) -> None:
    assert run_search(replay, five_layers(4, with_workspace=False), Launch()) == 20


def test_found_inf_skips(replay: Callable[[Message], bytes]) -> None:
    run_search(replay, five_layers(4, found_inf=(0.0, 1.0, 0.0, 1.0)), Launch())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True])
def test_swaps_of_any_scores(replay: Callable[[Message], bytes], kind: str, joint: bool) -> None:
    """No gradient comes, so that the scores stay what they are: NaN, infinities, ties."""
    rng = np.random.default_rng(1)
    for pairs, rate in zip(PAIRS, (0.3, 1.0, 0.5), strict=True):
        sizes = (1, 33, 200, 2000)
        scores = [torch.from_numpy(draw_scores(rng, kind, n)) for n in sizes]
        masks = [torch.from_numpy(draw_mask(rng, n)) for n in sizes]
        grads = [[torch.empty(0)] * len(sizes)] * 3
        run_search(replay, Search(scores, masks, grads, None, joint, pairs, rates=rate), Launch())
