import pytest
import torch
import torch.nn.functional as F
from closed_forms import assert_near, conv, double

from jackpot_kernels import masked_conv1d, masked_conv2d, masked_conv3d, pack_mask

MASKED = {1: masked_conv1d, 2: masked_conv2d, 3: masked_conv3d}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# Batch, spatial sizes, outputs, inputs, kernel, and options.
CASES = {
    "1d": (2, (9,), 4, 3, (3,), {}),
    "1d all": (2, (13,), 6, 4, (3,), {"stride": 2, "padding": 3, "dilation": 2, "groups": 2}),
    "2d": (2, (5, 7), 5, 3, (3, 3), {"padding": 1}),
    "2d all": (
        2,
        (9, 8),
        6,
        9,
        (3, 2),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3), "groups": 3},
    ),
    "1x1": (3, (4, 4), 7, 5, (1, 1), {}),
    "depthwise": (2, (6, 6), 8, 4, (3, 3), {"groups": 4, "padding": 1}),
    "primes": (3, (11, 7), 13, 5, (5, 3), {"stride": 2}),
    "ones": (1, (1, 1), 1, 1, (1, 1), {}),
    "empty batch": (0, (5, 5), 4, 3, (3, 3), {"padding": 1}),
    "3d": (2, (4, 5, 3), 4, 2, (2, 3, 1), {"padding": (0, 1, 0), "groups": 2}),
    "valid": (2, (6, 5), 4, 2, (3, 3), {"padding": "valid"}),
    "same": (2, (6, 5), 4, 2, (3, 3), {"padding": "same", "dilation": 2}),
    "same, uneven": (2, (6, 5), 4, 2, (4, 3), {"padding": "same", "dilation": (1, 2)}),
}


def problem(case, dtype=torch.float32, channels_last=False):
    batch, spatial, outputs, inputs, kernel, options = CASES[case]
    x = torch.randn(batch, inputs, *spatial).to(dtype)
    weight = torch.randn(outputs, inputs // options.get("groups", 1), *kernel).to(dtype)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    scores = torch.randn(weight.shape)
    bias = torch.randn(outputs).to(dtype)
    mask = torch.rand(weight.shape) < 0.4
    return [t.requires_grad_() for t in (x, weight, scores)], mask, bias.requires_grad_(), options


def plain(x, weight, mask, bias, grad, options):
    """Return what PyTorch computes in the dtype of x: y, dx, G * mask, G * weight and db."""
    x, bias = (t.detach().to(x.dtype).requires_grad_() for t in (x, bias))
    effective = (weight.detach() * mask).to(x.dtype).requires_grad_()
    y = PLAIN[x.dim() - 2](x, effective, bias, **options)
    y.backward(grad)
    g = effective.grad
    return y, x.grad, g * mask, g.float() * weight.detach().float(), bias.grad


def geometry(x, weight, options):
    """Return stride, dilation, groups and the padding before and after, one for each dimension."""
    dims = x.dim() - 2
    stride, dilation, padding = (
        (value,) * dims if isinstance(value := options.get(name, default), int) else value
        for name, default in (("stride", 1), ("dilation", 1), ("padding", 0))
    )
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(0, 0)] * dims if padding == "valid" else [(p, p) for p in padding]
    return stride, dilation, options.get("groups", 1), pads


def assert_right(y, x, weight, scores, mask, bias, options, dtype, like_y=False):
    """Differentiate y and compare everything with the closed forms; its gradient is contiguous, or like y."""
    grad = torch.randn(y.shape).to(y.dtype)
    if like_y:
        grad = torch.empty_like(y).copy_(grad)
    grads = torch.autograd.grad(y, (x, weight, scores, bias), grad)
    arrays = map(double, (x, weight, mask, bias))
    truth = conv(*arrays, lambda shape: double(grad).reshape(shape), *geometry(x, weight, options))
    theirs = plain(x.to(y.dtype), weight, mask, bias, grad, options)
    for our, their, true in zip((y, *grads), theirs, truth, strict=True):
        assert_near(our, their, true, dtype)
    return grads


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_closed_form(case, dtype, backend):
    (x, weight, scores), mask, bias, options = problem(case, dtype)
    y = MASKED[x.dim() - 2](x, weight, scores, mask, bias, **options, backend=backend)
    assert y.dtype == dtype
    dx, dweight, dscores, dbias = assert_right(y, x, weight, scores, mask, bias, options, dtype)
    assert dx.dtype == dweight.dtype == dbias.dtype == dtype
    assert dscores.dtype == torch.float32 and dscores.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ["2d", "2d all", "1x1", "depthwise", "same"])
def test_channels_last(case, dtype):
    (x, weight, scores), mask, bias, options = problem(case, dtype, channels_last=True)
    y = masked_conv2d(x, weight, scores, mask, bias, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dscores = assert_right(y, x, weight, scores, mask, bias, options, dtype)[2]
    assert dscores.is_contiguous()


def test_unbatched():
    (x, weight, scores), mask, bias, options = problem("2d all")
    one = x.detach()[0].requires_grad_()
    y = masked_conv2d(one, weight, scores, mask, bias, **options)
    batched = masked_conv2d(one.unsqueeze(0), weight, scores, mask, bias, **options)
    assert torch.equal(y, batched.squeeze(0))
    assert torch.autograd.grad(y.sum(), one)[0].shape == one.shape


def test_words_and_bool_give_the_same_bits():
    (x, weight, scores), mask, bias, options = problem("2d all")
    words = pack_mask(mask)
    results = [masked_conv2d(x, weight, scores, m, bias, **options) for m in (mask, words)]
    assert torch.equal(*results)


def test_frozen_inputs_get_no_gradient():
    (x, weight, scores), mask, bias, options = problem("2d")
    weight.requires_grad_(False)
    masked_conv2d(x, weight, scores, mask, **options).sum().backward()
    assert weight.grad is None and bias.grad is None and scores.grad is not None and x.grad is not None
    x.grad, scores.grad = None, None
    scores.requires_grad_(False)
    masked_conv2d(x, weight, scores, mask, bias, **options).sum().backward()
    assert scores.grad is None and x.grad is not None and bias.grad is not None


def test_weight_learns_without_scores():
    (x, weight, scores), mask, bias, options = problem("2d")
    y = masked_conv2d(x, weight, scores, mask, bias, **options)
    (wanted,) = torch.autograd.grad(y.sum(), weight)
    scores.requires_grad_(False)
    masked_conv2d(x.detach(), weight, scores, mask, **options).sum().backward()
    torch.testing.assert_close(weight.grad, wanted)


def test_repeats_bit_for_bit():
    (x, weight, scores), mask, bias, options = problem("primes")

    def run():
        y = masked_conv2d(x, weight, scores, mask, bias, **options)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight, scores, bias))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("case", ["1d all", "2d all", "3d"])
def test_gradcheck_of_x_and_bias(case):
    (x, weight, scores), mask, bias, options = problem(case, torch.float64)
    weight.requires_grad_(False)
    scores.requires_grad_(False)
    masked = MASKED[x.dim() - 2]

    def y(x, bias):
        return masked(x, weight, scores, mask, bias, **options)

    assert torch.autograd.gradcheck(y, (x, bias), fast_mode=True)


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_autocast(backend):
    (x, weight, scores), mask, bias, options = problem("2d all")
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight, scores, mask, bias, **options, backend=backend)
    assert y.dtype == torch.bfloat16
    grads = assert_right(y, x, weight, scores, mask, bias, options, torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_second_derivatives():
    """A penalty on the first gradients is differentiated as with a plain effective weight."""
    (x, weight, scores), mask, bias, options = problem("2d")
    frozen, effective = weight.detach(), (weight * mask).detach().requires_grad_()

    def derivatives(y, leaf, factor):
        dx, dleaf = torch.autograd.grad(y.square().sum(), (x, leaf), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + (dleaf * factor).square().sum(), (x, leaf))

    dx, dscores = derivatives(masked_conv2d(x, frozen, scores, mask, bias, **options), scores, 1)
    wanted, behind = derivatives(F.conv2d(x, effective, bias, **options), effective, frozen)
    torch.testing.assert_close(dx, wanted)
    torch.testing.assert_close(dscores, behind * frozen)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    (x, weight, scores), mask, bias, options = problem("same, uneven")
    words = pack_mask(mask)

    def loss(x, scores, bias):
        return masked_conv2d(x, weight.detach(), scores, words, bias, **options).square().sum()

    torch._dynamo.reset()
    inputs = x, scores, bias
    graph = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
    for ours, eager in zip(graph, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(ours, eager)


ONES = torch.ones
ERRORS = [
    (
        {"x": ONES(2, 5, 6, 6)},
        ValueError,
        "x must have 4 or 3 dimensions and 4 channels, got shape [2, 5, 6, 6]",
    ),
    ({"x": ONES(4, 6)}, ValueError, "x must have 4 or 3 dimensions and 4 channels, got shape [4, 6]"),
    ({"x": ONES(2, 4, 6, 6).half()}, TypeError, "x must be float32, got float16"),
    ({"groups": 4}, ValueError, "groups must divide the 6 output channels of weight, got 4"),
    ({"groups": 0}, ValueError, "groups must divide the 6 output channels of weight, got 0"),
    ({"groups": "2"}, TypeError, "groups must be an integer, got str"),
    ({"groups": (1,)}, TypeError, "groups must be an integer, got tuple"),
    ({"bias": ONES(4)}, ValueError, "bias must have shape [6], got [4]"),
    ({"scores": ONES(6, 2, 3, 3).double()}, TypeError, "scores must be float32, got float64"),
    ({"scores": ONES(6, 2, 3)}, ValueError, "scores must have shape [6, 2, 3, 3], got [6, 2, 3]"),
    ({"mask": ONES(6, 2, 3, 3)}, TypeError, "mask must be a bool tensor, or int32 words, got float32"),
    ({"mask": ONES(2).int()}, ValueError, "mask as words must have shape [4], got [2]"),
    (
        {"weight": ONES(6, 2, 3)},
        ValueError,
        "weight must have 4 dimensions, none of them empty, got shape [6, 2, 3]",
    ),
    ({"weight": ONES(6, 0, 3, 3)}, ValueError, "weight must have 4 dimensions, none of them empty"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be one number or 2, got (1, 1, 1)"),
    ({"stride": 1.5}, TypeError, "stride must be an integer or 2 of them, got 1.5"),
    ({"dilation": "a"}, TypeError, "dilation must be an integer or 2 of them, got 'a'"),
    ({"padding": None}, TypeError, "padding must be an integer or 2 of them, got None"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1, got 0"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": (1,)}, ValueError, "padding must be one number or 2, got (1,)"),
    ({"padding": "full"}, ValueError, 'padding must be numbers, "valid" or "same", got \'full\''),
    ({"padding": "same", "stride": 2}, ValueError, 'stride must be 1 where padding is "same", got (2, 2)'),
    (
        {"backend": "slow"},
        ValueError,
        "backend must be one of auto, fused, mixed, dense, reference, got 'slow'",
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message):
    arguments = {name: ONES(6, 2, 3, 3) for name in ("weight", "scores")}
    arguments |= {"x": ONES(2, 4, 6, 6), "mask": ONES(6, 2, 3, 3).bool(), "bias": ONES(6), "groups": 2}
    with pytest.raises(error) as caught:
        masked_conv2d(**arguments | change)
    assert str(caught.value).startswith(message)
