"""Swap selection, exactly, against the NumPy oracle; hot and cold paths against each other."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jackpot_kernels import pack_mask, reference, swap_, unpack_mask
from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace

KINDS = ("normal", "few values", "two values", "all equal", "NaN", "infinities")


def draw_scores(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    values = {
        "normal": rng.standard_normal(n),
        "few values": rng.integers(-2, 3, n) / 4,
        "two values": np.where(rng.random(n) < 0.3, 1.0, 0.99),
        "all equal": np.full(n, 0.99),
        "NaN": np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n)),
        "infinities": rng.choice([-np.inf, -0.0, 0.0, np.inf], n),
    }
    return values[kind].astype(np.float32)


def draw_mask(rng: np.random.Generator, n: int) -> np.ndarray:
    mask = rng.random(n) < rng.choice([0.05, 0.5, 1.0])
    mask[rng.integers(n)] = True
    return mask


def run_swap(
    scores: list[np.ndarray],
    masks: list[np.ndarray],
    last: list[int],
    rate: float,
    ramp: float,
    **how: object,
) -> tuple[list[np.ndarray], Tensor]:
    """Return masks and stats after step 5 of a schedule whose other steps would fail the test."""
    words = [pack_mask(torch.from_numpy(m)) for m in masks]
    now = [int(m.sum()) for m in masks]
    first = [sum(now)] if how.get("joint") else now
    schedule = torch.full((9, 2), float("nan"), dtype=torch.float64)
    schedule[4] = torch.tensor([rate, ramp], dtype=torch.float64)
    control = torch.tensor([5, 2, 0])
    num_kept = torch.tensor([first, last]).T.contiguous()
    stats = swap_([torch.from_numpy(s) for s in scores], words, num_kept, schedule, control, **how)
    return [unpack_mask(w, m.shape).numpy() for w, m in zip(words, masks, strict=True)], stats


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
    rate=st.sampled_from([0.0, 1e-18, 0.3, 0.5, 1.0]),
    ramp=st.sampled_from([0.0, 0.4, 1.0]),
    pairs=st.sampled_from(["best", "inverse", "random"]),
    joint=st.booleans(),
    seed=st.integers(0, 2**62),
)
def test_equals_the_oracle(
    sizes: list[int], kind: str, rate: float, ramp: float, pairs: str, joint: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = [draw_scores(rng, kind, n) for n in sizes]
    masks = [draw_mask(rng, n) for n in sizes]
    segments = [np.concatenate(scores)] if joint else scores
    segment_masks = [np.concatenate(masks)] if joint else masks
    first = [int(m.sum()) for m in segment_masks]
    last = [int(rng.integers(1, k + 1)) for k in first]
    after, stats = run_swap(scores, masks, last, rate, ramp, pairs=pairs, joint=joint, seed=seed)
    if joint:
        after = [np.concatenate(after)]
    for i, segment in enumerate(segments):
        target = last[i] + int(np.ceil((first[i] - last[i]) * ramp))
        wanted = oracle.swap(segment, segment_masks[i], target, rate, pairs, seed, 5)
        assert np.array_equal(after[i], wanted.mask)
        assert stats[i, :3].tolist() == [wanted.proposed, wanted.entered, wanted.left]
        assert stats[i, 3] == int(np.float32(wanted.threshold).view(np.int32))


def test_more_to_keep_than_is_kept() -> None:
    rng = np.random.default_rng(0)
    scores, mask = draw_scores(rng, "normal", 50), np.arange(50) < 10
    after, stats = run_swap([scores], [mask], [30], 0.5, 0.5)
    wanted = oracle.swap(scores, mask, 10, 0.5, "best", 0, 5)
    assert np.array_equal(after[0], wanted.mask)
    assert stats[0, :3].tolist() == [wanted.proposed, wanted.entered, wanted.left]


class Search:
    """A search over a few layers that the kernels and `reference.py` run side by side."""

    def __init__(self, joint: bool, total_steps: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        shapes = ((32, 3, 3, 3), (1, 1), (50, 333), (17,), (32, 16, 3, 3))
        self.joint = joint
        masks = [torch.rand(shape) < 0.1 for shape in shapes]
        for mask in masks:
            mask.view(-1)[0] = True
        self.scores = [torch.where(mask, 1.0, 0.99) for mask in masks]
        self.momenta = [torch.zeros(shape) for shape in shapes]
        self.words = [pack_mask(mask) for mask in masks]
        self.weights = [torch.randn(shape) for shape in shapes]
        self.weights[-1] = self.weights[-1].to(memory_format=torch.channels_last)
        pairs = zip(self.weights, self.words, strict=True)
        self.effective = [effective_weight(w, words, dtype) for w, words in pairs]
        self.effective[3] = torch.empty(0)
        kept = torch.stack([mask.sum() for mask in masks])
        kept = kept.sum().view(1) if joint else kept
        self.num_kept = torch.stack([kept, (kept + 1) // 2], 1)
        u = torch.arange(1, total_steps + 1, dtype=torch.float64) / total_steps
        self.schedule = torch.stack([(1 - u) ** 4, (1 - 2 * u).clamp(min=0) ** 3], 1)
        self.hyper = torch.tensor([[0.1, 0.9, 5e-4, 0, 1]] * len(shapes))
        self.control = torch.zeros(3, dtype=torch.int64)
        self.workspace = new_workspace(self.scores, joint)

    def step(self, grads: list[Tensor]) -> Tensor:
        how = {"workspace": self.workspace, "joint": self.joint}
        score_update_(self.scores, self.momenta, grads, self.words, self.hyper, self.control, **how)
        patched = {"weights": self.weights, "effective": self.effective}
        settings = (self.num_kept, self.schedule, self.control)
        return swap_(self.scores, self.words, *settings, **patched, **how)

    def reference_step(self, grads: list[Tensor]) -> Tensor:
        state = (self.scores, self.momenta, self.words)
        settings = (self.hyper, self.num_kept, self.schedule, self.control)
        patched = {"weights": self.weights, "effective": self.effective}
        return reference.search_step_(*state, grads, *settings, **patched, joint=self.joint)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_search_equals_the_reference_on_hot_and_cold_paths(
    joint: bool, ties: bool, dtype: torch.dtype
) -> None:
    steps = 40
    ours, wanted = Search(joint, steps, dtype), Search(joint, steps, dtype)
    cold = 0
    for t in range(steps):
        grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
        if ties:
            grads = [(100 * g).round() / 100 for g in grads]
        if t == 7:
            grads[2].view(-1)[5] = float("nan")
        stats, wanted_stats = ours.step(grads), wanted.reference_step(grads)
        cold += int(stats[:, 4].sum())
        assert torch.equal(stats[:, :4], wanted_stats[:, :4])
        for name in ("scores", "words", "effective"):
            assert all(map(torch.equal, getattr(ours, name), getattr(wanted, name))), (t, name)
    # Both ways were taken: the first step has no window yet, and later ones find theirs.
    assert len(stats) <= cold < 0.5 * steps * len(stats)


def test_windows_that_miss_change_nothing() -> None:
    ours, wanted = Search(False, 40), Search(False, 40)
    cold = 0
    for _ in range(40):
        shift = 5 * torch.randn(())  # all scores move together, away from where the window was aimed
        grads = [shift + 0.01 * torch.randn(s.shape) for s in ours.scores]
        stats, wanted_stats = ours.step(grads), wanted.reference_step(grads)
        cold += int(stats[:, 4].sum())
        assert torch.equal(stats[:, :4], wanted_stats[:, :4])
        assert all(map(torch.equal, ours.words, wanted.words))
    assert cold > 20


def jump(entering: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A mask of 4096 ones, scores that 100 of either class cross, and scores that 500 more cross next.

    The lists of candidates end at the 100, beyond the window, which 60 others of the class enter. The 500 of
    one class, `entering` or leaving, lie in the gap between the list's end and the window.
    """
    before = torch.full((8192,), 0.1)
    before[:3996] = 2 + torch.arange(3996) * 1e-4
    before[3996:4096] = 0.5 - torch.arange(100) * 1e-4
    before[4096:4196] = 3 + torch.arange(100) * 1e-3
    after = before.clone()
    if entering:
        after[3496:3996], after[4196:4696], after[4696:4756] = 0.4, 2.5, 1.999
    else:
        after[3496:3996], after[4196:4696], after[3436:3496] = 1.0, 4.0, 2.0005
    return torch.arange(8192) < 4096, before, after


@pytest.mark.parametrize("entering", [True, False])
def test_a_list_and_a_window_do_not_stand_for_what_lies_between(entering: bool) -> None:
    mask, *scores = jump(entering)
    schedule = torch.tensor([[0, 1], [0.2, 1]], dtype=torch.float64)
    momenta, empty, hyper = torch.zeros(8192), torch.empty(0), torch.zeros(1, 5)
    ours, wanted, workspace = pack_mask(mask), pack_mask(mask), new_workspace(scores[:1])
    control = torch.zeros(3, dtype=torch.int64)
    for values in scores:
        score_update_([values], [momenta], [empty], [ours], hyper, control, workspace=workspace)
        settings = (torch.tensor([[4096, 4096]]), schedule, control)
        stats = swap_([values], [ours], *settings, workspace=workspace)
        assert torch.equal(stats[:, :4], reference.swap_([values], [wanted], *settings)[:, :4])
        assert torch.equal(ours, wanted)


def test_candidates_of_an_earlier_update_are_not_taken() -> None:
    ours, wanted = Search(False, 40), Search(False, 40)
    grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
    for search in (ours, wanted):
        for _ in range(6):
            search.step(grads)
        state = (search.scores, search.momenta, grads, search.words, search.hyper, search.control)
        score_update_(*state, workspace=search.workspace)
        score_update_(*state)
    settings = (ours.num_kept, ours.schedule, ours.control)
    stats = swap_(ours.scores, ours.words, *settings, workspace=ours.workspace)
    wanted_stats = reference.swap_(wanted.scores, wanted.words, *settings)
    assert torch.equal(stats[:, :4], wanted_stats[:, :4]) and bool(stats[:, 4].all())
    assert all(map(torch.equal, ours.words, wanted.words))


def test_candidates_serve_one_swap_only() -> None:
    """A second swap at the same step sees masks that the candidates do not know."""
    ours, wanted = Search(False, 40), Search(False, 40)
    for _ in range(6):
        grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
        ours.step(grads)
        wanted.reference_step(grads)
    settings = (ours.num_kept, ours.schedule, ours.control)
    stats = swap_(ours.scores, ours.words, *settings, workspace=ours.workspace)
    wanted_stats = reference.swap_(wanted.scores, wanted.words, *settings)
    assert torch.equal(stats[:, :4], wanted_stats[:, :4]) and bool(stats[:, 4].all())
    assert all(map(torch.equal, ours.words, wanted.words))


def test_a_skipped_step_swaps_nothing() -> None:
    scores, words = [torch.tensor([0.0, 1.0])], [pack_mask(torch.tensor([True, False]))]
    schedule = torch.ones(3, 2, dtype=torch.float64)
    stats = swap_(scores, words, torch.tensor([[1, 1]]), schedule, torch.tensor([1, 1, 1]))
    assert words[0].tolist() == [1] and not stats.any()


@pytest.mark.parametrize("channels_last", ["weight", "effective"])
def test_weight_and_effective_weight_of_different_strides(channels_last: str) -> None:
    scores, mask = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5) < 0.3
    weight = torch.randn(4, 3, 5, 5)
    effective = [[weight * mask], [weight * mask]]
    if channels_last == "weight":
        weight = weight.to(memory_format=torch.channels_last)
    else:
        effective = [[e[0].to(memory_format=torch.channels_last)] for e in effective]
    ours, wanted = [pack_mask(mask)], [pack_mask(mask)]
    kept, schedule = int(mask.sum()), torch.ones(1, 2, dtype=torch.float64)
    settings = (torch.tensor([[kept, kept]]), schedule, torch.tensor([1, 0, 0]))
    swap_([scores], ours, *settings, weights=[weight], effective=effective[0])
    reference.swap_([scores], wanted, *settings, weights=[weight], effective=effective[1])
    assert torch.equal(ours[0], wanted[0]) and torch.equal(effective[0][0], effective[1][0])


def test_more_threads_than_segments() -> None:
    rng = np.random.default_rng(0)
    scores, masks = [draw_scores(rng, "normal", 50_000)], [draw_mask(rng, 50_000)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_swap(scores, masks, [int(masks[0].sum())], 0.5, 1.0))
    torch.set_num_threads(before)
    for after, stats in results[1:]:
        assert np.array_equal(after[0], results[0][0][0]) and torch.equal(stats, results[0][1])


def test_refuses_what_does_not_fit() -> None:
    scores, words = [torch.ones(40)], [pack_mask(torch.ones(40, dtype=torch.bool))]
    num_kept, schedule = torch.tensor([[40, 40]]), torch.ones(3, 2, dtype=torch.float64)
    control = torch.tensor([1, 0, 0])
    with pytest.raises(ValueError, match="pairs must be one of best, inverse, random, got 'worst'"):
        swap_(scores, words, num_kept, schedule, control, pairs="worst")
    with pytest.raises(TypeError, match=r"^num_kept must be a tensor, got NoneType$"):
        swap_(scores, words, None, schedule, control)
    with pytest.raises(TypeError, match=r"^scores must be a list of tensors, got Tensor$"):
        swap_(scores[0], words, num_kept, schedule, control)
    with pytest.raises(TypeError, match=r"^weights must be a tensor, got NoneType$"):
        swap_(scores, words, num_kept, schedule, control, weights=[None], effective=[None])
    with pytest.raises(RuntimeError, match="one int32 word for 32 weights"):
        swap_(scores, [words[0][:1]], num_kept, schedule, control)
    with pytest.raises(RuntimeError, match=r"control\[0\] must be in \[1, 3\].*got 4"):
        swap_(scores, words, num_kept, schedule, torch.tensor([4, 0, 0]))
    with pytest.raises(RuntimeError, match="num_kept"):
        swap_(scores, words, num_kept[:, :1], schedule, control)
    with pytest.raises(RuntimeError, match="effective must have the weight's shape"):
        swap_(scores, words, num_kept, schedule, control, weights=[torch.ones(40)], effective=[torch.ones(2)])


@pytest.mark.parametrize(
    "name", ["masks", "weights", "effective", "num_kept", "schedule", "control", "workspace"]
)
def test_refuses_the_meta_device_for_some_tensors_only(name: str) -> None:
    """Torch runs the fake of an operator then, and the statistics were memory of nobody."""
    mask = torch.arange(40) < 4
    arguments = {
        "scores": [torch.rand(40)],
        "masks": [pack_mask(mask)],
        "weights": [torch.rand(40)],
        "effective": [torch.rand(40) * mask],
        "num_kept": torch.tensor([[4, 4]]),
        "schedule": torch.ones(3, 2, dtype=torch.float64),
        "control": torch.tensor([1, 0, 0]),
        "workspace": new_workspace([torch.rand(40)]),
    }

    def on_meta(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return value.to("meta") if isinstance(value, Tensor) else [value[0].to("meta")]

    with pytest.raises(ValueError, match=f"^{name} must be on cpu, got meta$"):
        swap_(**{**arguments, name: on_meta(arguments[name])})
    stats = swap_(**{key: on_meta(value) for key, value in arguments.items()})
    assert stats.is_meta and stats.shape == (1, 5)


def test_operator_passes_opcheck() -> None:
    search = Search(False, 5)
    search.control[0] = 1
    arguments = (search.scores, search.words, search.weights, search.effective)
    settings = (search.num_kept, search.schedule, search.control)
    torch.library.opcheck(
        torch.ops.jackpot.swap_, (*arguments, *settings, False, "best", 0, search.workspace)
    )


def test_refuses_segments_that_keep_nothing() -> None:
    scores, mask = torch.rand(50), torch.arange(50) < 5
    schedule, control = torch.ones(2, 2, dtype=torch.float64), torch.tensor([1, 0, 0])
    with pytest.raises(RuntimeError, match="num_kept must be at least 1"):
        swap_([scores], [pack_mask(mask)], torch.tensor([[5, 0]]), schedule, control)
    with pytest.raises(RuntimeError, match="masks must keep at least one weight of each segment"):
        swap_([scores], [pack_mask(mask & False)], torch.tensor([[5, 5]]), schedule, control)


@pytest.mark.parametrize("row", [(100.0, 0.5), (-1.0, 0.5), (0.5, -100.0), (0.5, 1.5), (float("nan"), 0.5)])
def test_refuses_rates_outside_0_and_1(row: tuple[float, float]) -> None:
    mask = torch.arange(50) < 5
    words, schedule = pack_mask(mask), torch.tensor([row], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"schedule must hold rates and ramps in \[0, 1\], got "):
        swap_([torch.rand(50)], [words], torch.tensor([[5, 5]]), schedule, torch.tensor([1, 0, 0]))
    assert torch.equal(words, pack_mask(mask))


def test_bits_after_the_last_weight_mean_nothing() -> None:
    scores, mask = torch.rand(33), torch.arange(33) < 17
    words, poisoned = pack_mask(mask), pack_mask(mask)
    poisoned[-1] |= -2
    settings = (torch.tensor([[17, 17]]), torch.ones(1, 2, dtype=torch.float64), torch.tensor([1, 0, 0]))
    assert torch.equal(swap_([scores], [words], *settings), swap_([scores], [poisoned], *settings))
    assert torch.equal(unpack_mask(words, mask.shape), unpack_mask(poisoned, mask.shape))
