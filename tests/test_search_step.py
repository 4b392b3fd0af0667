"""The whole step in one call, against its two halves and the reference."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from test_swap import Search
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jackpot_kernels.ops.search_step import SearchStep


def begin(search: Search, **options: object) -> SearchStep:
    settings = (search.hyper, search.num_kept, search.schedule, search.control)
    options = {"joint": search.joint, "workspace": search.workspace, **options}
    return SearchStep(
        search.scores,
        search.momenta,
        search.words,
        *settings,
        search.num_kept.new_full((len(search.num_kept), 5), -1),
        weights=search.weights,
        effective=search.effective,
        **options,
    )


def ones(search: Search) -> list[Tensor]:
    return [torch.ones(s.shape) for s in search.scores]


def require_same(search: Search, other: Search) -> None:
    for name in ("scores", "momenta", "words", "effective"):
        assert all(map(torch.equal, getattr(search, name), getattr(other, name))), name
    assert torch.equal(search.control, other.control)


@pytest.mark.parametrize("joint", [False, True])
def test_equals_update_and_swap_and_the_reference(joint: bool) -> None:
    steps = 30
    ours, halves, wanted = (Search(joint, steps) for _ in range(3))
    step = begin(ours)
    for t in range(steps):
        grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
        if t == 7:
            grads[2].view(-1)[5] = float("nan")
        step(grads)
        assert torch.equal(step.stats, halves.step(grads))
        assert torch.equal(step.stats[:, :4], wanted.reference_step(grads)[:, :4])
        require_same(ours, wanted)
    assert ours.control.tolist() == [steps - 1, 1, 0]


def test_found_inf_skips_the_step() -> None:
    search, before = Search(False, 5), Search(False, 5)
    step = begin(search)
    step(ones(search), torch.tensor(1.0))
    assert not step.stats.any() and search.control.tolist() == [0, 1, 1]
    before.control[1:] = 1
    require_same(search, before)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_counts_in_a_compiled_function(backend: str) -> None:
    """Which reads what a step wrote, too."""
    ours, wanted = Search(False, 9), Search(False, 9)

    def train(search: Search, steps: list[SearchStep], grads: list[Tensor]) -> Tensor:
        before = 2 * search.scores[0]
        if not steps:
            steps.append(begin(search))
        steps[0](grads)
        return before - search.scores[0]

    torch._dynamo.reset()
    compiled, steps, wanted_steps = torch.compile(train, backend=backend), [], []
    for _ in range(4):
        grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
        assert torch.equal(compiled(ours, steps, grads), train(wanted, wanted_steps, grads))
        require_same(ours, wanted)


def test_says_that_it_wrote() -> None:
    search = Search(False, 5)
    written = [*search.scores, *search.momenta, *search.words, *search.effective]
    before = [tensor._version for tensor in written]
    begin(search)(ones(search))
    assert [tensor._version for tensor in written] == [version + 1 for version in before]


def test_finds_memory_that_moved() -> None:
    """What a search holds are the tensors, wherever their memory is when a step comes."""
    ours, wanted = Search(False, 5), Search(False, 5)
    step = begin(ours)
    for t in range(3):
        step(ones(ours))
        wanted.step(ones(wanted))
        require_same(ours, wanted)
        left = [ours.scores[2].data, ours.words[0].data]
        before = [tensor.clone() for tensor in left]
        ours.scores[2].data, ours.words[0].data = left[0].clone(), left[1].clone()
        ours.momenta[4].share_memory_()
        if t:
            assert all(map(torch.equal, left, before))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda search: setattr(search.scores[2], "data", torch.zeros(7)), "masks must have one int32 word"),
        (lambda search: setattr(search.momenta[1], "data", torch.zeros(2)), "momenta must have the scores'"),
        (lambda search: setattr(search.words[0], "data", torch.zeros(27)), "masks must be a contiguous CPU"),
        (
            lambda search: setattr(search.effective[0], "data", torch.zeros(3)),
            "effective must have the weight",
        ),
        (
            lambda search: [
                setattr(t[0], "data", torch.zeros(3)) for t in (search.weights, search.effective)
            ],
            "weights must have the scores' shapes",
        ),
        (lambda search: search.num_kept.resize_(1, 2), "num_kept must be"),
        (lambda search: search.workspace.resize_(5), "workspace must be made for these layers"),
        (lambda search: search.schedule.fill_(float("nan")), "schedule must hold rates and ramps"),
        (lambda search: search.control.fill_(5), r"control\[0\] must be in \[0, 5\) before a step, got 5"),
    ],
)
def test_memory_that_no_longer_fits_changes_nothing(spoil: Callable[[Search], object], message: str) -> None:
    search, before = Search(False, 5), Search(False, 5)
    step = begin(search)
    for one in (search, before):
        spoil(one)
    with pytest.raises(RuntimeError, match=message):
        step(ones(search))
    require_same(search, before)


@pytest.mark.parametrize("around", [nullcontext, FakeTensorMode])
def test_a_search_ends_with_its_object(around: Callable[[], AbstractContextManager[object]]) -> None:
    """Also where torch.compile traces something else meanwhile."""
    search, other = Search(False, 5), Search(False, 5)
    step, kept = begin(search), begin(other)
    number = step._search
    with around():
        del step
        gc.collect()
    with pytest.raises(RuntimeError, match=f"search must be one that was begun here, got {number}"):
        torch.ops.jackpot.search_step_(search.control, number, ones(search), None)
    kept(ones(other))
    assert other.control.tolist() == [1, 0, 0]


def test_refuses_unknown_pairs() -> None:
    with pytest.raises(ValueError, match="pairs must be one of best, inverse, random, got 'worst'"):
        begin(Search(False, 5), pairs="worst")


def test_refuses_gradients_on_the_meta_device() -> None:
    search = Search(False, 5)
    with pytest.raises(ValueError, match=r"^grads must be on cpu, got meta$"):
        begin(search)([grad.to("meta") for grad in ones(search)])
    assert search.control.tolist() == [0, 0, 0]


def test_operator_passes_opcheck() -> None:
    search = Search(False, 5)
    step = begin(search)
    torch.library.opcheck(torch.ops.jackpot.search_step_, (search.control, step._search, ones(search), None))
