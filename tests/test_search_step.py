"""The whole step in one call, against its two halves and the reference."""

import pytest
import torch
from test_swap import Search
from torch import Tensor

from jackpot_kernels.ops.search_step import search_step_


def one_call(search: Search, grads: list[Tensor], **options: object) -> Tensor:
    return search_step_(
        search.scores,
        search.momenta,
        grads,
        search.words,
        search.hyper,
        search.num_kept,
        search.schedule,
        search.control,
        weights=search.weights,
        effective=search.effective,
        joint=search.joint,
        workspace=search.workspace,
        **options,
    )


@pytest.mark.parametrize("joint", [False, True])
def test_equals_update_and_swap_and_the_reference(joint: bool) -> None:
    steps = 30
    ours, halves, wanted = (Search(joint, steps) for _ in range(3))
    for t in range(steps):
        grads = [0.01 * torch.randn(s.shape) for s in ours.scores]
        if t == 7:
            grads[2].view(-1)[5] = float("nan")
        stats = one_call(ours, grads)
        assert torch.equal(stats, halves.step(grads))
        assert torch.equal(stats[:, :4], wanted.reference_step(grads)[:, :4])
        for name in ("scores", "momenta", "words", "effective"):
            assert all(map(torch.equal, getattr(ours, name), getattr(wanted, name))), (t, name)
        assert torch.equal(ours.control, wanted.control)
    assert ours.control.tolist() == [steps - 1, 1, 0]


def test_found_inf_skips_the_step() -> None:
    search, before = Search(False, 5), Search(False, 5)
    stats = one_call(search, [torch.ones(s.shape) for s in search.scores], found_inf=torch.tensor(1.0))
    assert not stats.any() and search.control.tolist() == [0, 1, 1]
    for name in ("scores", "momenta", "words", "effective"):
        assert all(map(torch.equal, getattr(search, name), getattr(before, name))), name


def test_says_that_it_wrote() -> None:
    search = Search(False, 5)
    written = [*search.scores, *search.momenta, *search.words, *search.effective]
    before = [tensor._version for tensor in written]
    one_call(search, [torch.ones(s.shape) for s in search.scores])
    assert [tensor._version for tensor in written] == [version + 1 for version in before]


def test_refuses_unknown_pairs() -> None:
    search, before = Search(False, 5), Search(False, 5)
    with pytest.raises(ValueError, match="pairs must be one of best, inverse, random, got 'worst'"):
        one_call(search, [torch.ones(s.shape) for s in search.scores], pairs="worst")
    assert all(map(torch.equal, search.scores, before.scores))


def test_operator_passes_opcheck() -> None:
    search = Search(False, 5)
    grads = [torch.ones(s.shape) for s in search.scores]
    tensors = (search.scores, search.momenta, grads, search.words, search.weights, search.effective)
    settings = (search.hyper, search.num_kept, search.schedule, search.control)
    torch.library.opcheck(
        torch.ops.jackpot.search_step_, (*tensors, *settings, None, False, "best", 0, search.workspace)
    )
