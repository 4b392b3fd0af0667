import pytest
import torch
import torch.nn.functional as F
from closed_forms import assert_near, double, linear

from jackpot_kernels import masked_linear, pack_mask

SHAPES = [  # leading dimensions of x, outputs, inputs
    ((4,), 8, 16),
    ((2, 3), 7, 13),
    ((2, 1, 5), 1, 31),
    ((), 3, 33),
    ((1,), 1, 1),
    ((0,), 5, 3),
    ((3, 0), 2, 4),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def problem(lead, outputs, inputs, dtype=torch.float32, keep=0.4):
    x = torch.randn(*lead, inputs).to(dtype).requires_grad_()
    weight = torch.randn(outputs, inputs).to(dtype).requires_grad_()
    scores = torch.randn(outputs, inputs, requires_grad=True)
    mask = torch.rand(outputs, inputs) < keep
    bias = torch.randn(outputs).to(dtype).requires_grad_()
    return x, weight, scores, mask, bias


def plain(x, weight, mask, bias, grad):
    """Return what PyTorch computes in the dtype of x: y, dx, G * mask, G * weight and db."""
    x, bias = (t.detach().requires_grad_() for t in (x, bias))
    effective = (weight.detach() * mask).to(x.dtype).requires_grad_()
    y = F.linear(x, effective, bias)
    y.backward(grad)
    g = effective.grad
    return y, x.grad, g * mask, g.float() * weight.detach().float(), bias.grad


def assert_right(y, x, weight, scores, mask, bias, dtype):
    """Differentiate y and compare everything with the closed forms; ``weight`` may be frozen."""
    grad = torch.randn(y.shape).to(y.dtype)
    inputs = [t for t in (x, weight, scores, bias) if t.requires_grad]
    grads = dict(zip(map(id, inputs), torch.autograd.grad(y, inputs, grad), strict=True))
    truth = linear(*map(double, (x, weight, mask, bias, grad)))
    theirs = plain(x, weight, mask, bias, grad)
    ours = y, *(grads.get(id(t)) for t in (x, weight, scores, bias))
    for our, their, true in zip(ours, theirs, truth, strict=True):
        if our is not None:
            assert_near(our, their, true, dtype)
    return grads


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_closed_form(shape, dtype, backend):
    x, weight, scores, mask, bias = problem(*shape, dtype)
    y = masked_linear(x, weight, scores, mask, bias, backend=backend)
    assert y.dtype == dtype
    grads = assert_right(y, x, weight, scores, mask, bias, dtype)
    assert grads[id(scores)].dtype == torch.float32 and grads[id(scores)].is_contiguous()
    assert grads[id(weight)].dtype == grads[id(x)].dtype == dtype


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_or_everything_pruned(keep):
    x, weight, scores, mask, bias = problem((6,), 5, 9, keep=keep)
    assert_right(masked_linear(x, weight, scores, mask, bias), x, weight, scores, mask, bias, torch.float32)


def test_words_and_bool_give_the_same_bits():
    x, weight, scores, mask, bias = problem((6,), 5, 9)
    words = pack_mask(mask)
    assert torch.equal(
        masked_linear(x, weight, scores, mask, bias), masked_linear(x, weight, scores, words, bias)
    )


def test_strides_do_not_matter():
    _, _, scores, _, bias = problem((6, 4), 5, 9)
    wide = torch.randn(6, 4, 18)[..., ::2].requires_grad_()
    turned = torch.randn(9, 5).t().requires_grad_()
    turned_mask = (torch.rand(9, 5) < 0.5).t()
    y = masked_linear(wide, turned, scores, turned_mask, bias)
    grads = assert_right(y, wide, turned, scores, turned_mask, bias, torch.float32)
    assert grads[id(scores)].is_contiguous()


def test_gradient_of_an_expanded_sum():
    x, weight, scores, mask, bias = problem((3, 4), 5, 9)
    masked_linear(x, weight, scores, mask, bias).sum().backward()
    ones = torch.ones(3, 4, 5)
    truth = linear(*map(double, (x, weight, mask, bias, ones)))
    for tensor, true in zip((x, weight, scores, bias), truth[1:], strict=True):
        assert_near(tensor.grad, tensor.grad, true, torch.float32)


def test_frozen_inputs_get_no_gradient():
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    weight.requires_grad_(False)
    masked_linear(x, weight, scores, mask).sum().backward()
    assert weight.grad is None and bias.grad is None and scores.grad is not None and x.grad is not None
    x.grad, scores.grad = None, None
    scores.requires_grad_(False)
    masked_linear(x, weight, scores, mask, bias).sum().backward()
    assert scores.grad is None and x.grad is not None and bias.grad is not None


def test_weight_learns_without_scores():
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    (wanted,) = torch.autograd.grad(masked_linear(x, weight, scores, mask, bias).sum(), weight)
    masked_linear(x.detach(), weight, scores.detach(), mask).sum().backward()
    torch.testing.assert_close(weight.grad, wanted)


def test_not_finite_weights_that_are_pruned_stay_out():
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    with torch.no_grad():
        weight[0, 0] = torch.inf
    mask[0, 0] = False
    y = masked_linear(x, weight, scores, mask, bias)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_repeats_bit_for_bit():
    x, weight, scores, mask, bias = problem((64,), 33, 129)

    def run():
        y = masked_linear(x, weight, scores, mask, bias)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight, scores, bias))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


def test_gradcheck_of_x_and_bias():
    x, weight, scores, mask, bias = problem((2, 3), 4, 5, torch.float64)
    weight.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda x, bias: masked_linear(x, weight, scores.detach(), mask, bias), (x, bias)
    )


def test_scores_of_float64_weights_get_float32_gradients():
    x, weight, scores, mask, bias = problem((6,), 5, 9, torch.float64)
    grads = assert_right(
        masked_linear(x, weight, scores, mask, bias), x, weight, scores, mask, bias, torch.float32
    )
    assert grads[id(scores)].dtype == torch.float32


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_autocast(backend):
    x, weight, scores, mask, bias = problem((6,), 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, scores, mask, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    grads = assert_right(y, x, weight, scores, mask, bias, torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_second_derivatives():
    """A penalty on the first gradients is differentiated as with a plain effective weight."""
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    frozen, effective = weight.detach(), (weight * mask).detach().requires_grad_()

    def derivatives(y, leaf, factor):
        dx, dleaf = torch.autograd.grad(y.square().sum(), (x, leaf), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + (dleaf * factor).square().sum(), (x, leaf))

    for leaf, factor, y in (
        (scores, frozen, masked_linear(x, frozen, scores, mask, bias)),
        (weight, mask, masked_linear(x, weight, scores.detach(), mask, bias)),
    ):
        dx, dleaf = derivatives(y, leaf, 1)
        wanted, behind = derivatives(F.linear(x, effective, bias), effective, factor)
        torch.testing.assert_close(dx, wanted)
        torch.testing.assert_close(dleaf, behind * factor)


def test_functorch_gradient():
    x, weight, scores, mask, bias = (t.detach() for t in problem((3,), 5, 9))
    grad = torch.func.grad(lambda s: masked_linear(x, weight, s, mask, bias).sum())(scores)
    torch.testing.assert_close(grad, x.sum(0) * weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    x, weight, scores, mask, bias = problem((6,), 5, 9)
    words = pack_mask(mask)

    def loss(x, scores, bias):
        return masked_linear(x, weight.detach(), scores, words, bias).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    inputs = x, scores, bias
    for eager, graph in zip(
        torch.autograd.grad(loss(*inputs), inputs),
        torch.autograd.grad(compiled(*inputs), inputs),
        strict=True,
    ):
        torch.testing.assert_close(graph, eager)


ERRORS = [
    ({"x": torch.ones(2, 8)}, ValueError, "x must have 9 elements in its last dimension, got shape [2, 8]"),
    ({"x": torch.ones(2, 9).half()}, TypeError, "x must be float32, got float16"),
    ({"x": torch.ones(2, 9, device="meta")}, ValueError, "x must be on cpu, got meta"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"bias": torch.ones(4)}, ValueError, "bias must have shape [5], got [4]"),
    ({"bias": torch.ones(5).double()}, TypeError, "bias must be float32, got float64"),
    ({"scores": torch.ones(5, 9).half()}, TypeError, "scores must be float32, got float16"),
    ({"scores": torch.ones(9, 5)}, ValueError, "scores must have shape [5, 9], got [9, 5]"),
    ({"mask": torch.ones(5, 9)}, TypeError, "mask must be a bool tensor, or int32 words, got float32"),
    ({"mask": None}, TypeError, "mask must be a bool tensor, or int32 words, got NoneType"),
    ({"mask": torch.ones(9, 5).bool()}, ValueError, "mask must have shape [5, 9], got [9, 5]"),
    ({"mask": torch.ones(3).int()}, ValueError, "mask as words must have shape [2], got [3]"),
    ({"mask": torch.ones(4).int()[::2]}, ValueError, "mask as words must be contiguous, got strides [2]"),
    ({"mask": torch.ones(5, 9, device="meta").bool()}, ValueError, "mask must be on cpu, got meta"),
    ({"weight": torch.ones(5, 9, 1)}, ValueError, "weight must have 2 dimensions, none of them empty"),
    ({"weight": torch.ones(5, 0)}, ValueError, "weight must have 2 dimensions, none of them empty"),
    ({"weight": torch.ones(5, 9).int()}, TypeError, "weight must be a floating-point tensor, got int32"),
    (
        {"backend": "fast"},
        ValueError,
        "backend must be one of auto, fused, mixed, dense, reference, got 'fast'",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message):
    tensors = {name: torch.ones(5, 9) for name in ("weight", "scores")}
    tensors |= {"x": torch.ones(2, 9), "mask": torch.ones(5, 9).bool(), "bias": torch.ones(5)}
    with pytest.raises(error) as caught:
        masked_linear(**tensors | change)
    assert str(caught.value).startswith(message)
