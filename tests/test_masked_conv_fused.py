"""The Triton kernels of the convolution through the public functions and layers, in Triton's interpreter."""

import math
from itertools import product

import pytest
import torch
from closed_forms import assert_near, conv, double
from test_masked_conv import CASES, MASKED, assert_right, geometry, plain, problem
from test_masked_linear_fused import spread_out, timed
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import jackpot_kernels as jk
from jackpot_kernels import masked_conv2d, masked_conv2d_score_grad_, masked_conv3d, pack_mask, reference
from jackpot_kernels.kernels import masked_conv as kernels
from jackpot_kernels.kernels import masked_conv_depthwise as depthwise
from jackpot_kernels.kernels.grad_tiles import split_sum
from jackpot_kernels.kernels.masked_conv_boxes import box_of, is_boxed, is_large, num_boxes
from jackpot_kernels.models import ResNet

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_gpu_masked_conv.py runs the kernels on the device"
)

# Besides those of the other backends: a tap at a time, sums in parts, and every way of being depthwise.
CASES = {name: case for name, case in CASES.items() if name != "3d"} | {
    "wide": (2, (4, 5), 18, 17, (3, 2), {"padding": 1}),
    "wide, all": (
        1,
        (9, 8),
        34,
        40,
        (3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": 2, "groups": 2},
    ),
    "wide 1x1": (2, (5, 3), 20, 17, (1, 1), {}),
    "wide, words and blocks": (1, (4, 3), 33, 70, (2, 1), {}),
    "wide 1x1, whole words": (1, (4, 3), 32, 64, (1, 1), {"stride": 2}),
    "wide 1x1, stride": (2, (7, 5), 20, 17, (1, 1), {"stride": 2}),
    "stride beyond the window": (2, (11, 7), 18, 16, (2, 1), {"stride": (3, 2), "padding": 1}),
    "stride and dilation share a factor": (1, (9, 9), 17, 16, (3, 3), {"stride": 2, "dilation": 2}),
    "in parts": (3, (12, 13), 4, 3, (3, 3), {"padding": 1}),
    "wide, in parts": (3, (9, 10), 5, 16, (3, 2), {}),
    "1d, depthwise": (2, (9,), 6, 6, (3,), {"groups": 6, "padding": 2, "dilation": 2}),
    "depthwise, stride": (2, (7, 9), 5, 5, (5, 3), {"groups": 5, "padding": 2, "stride": 2}),
    "depthwise, wide": (1, (9, 9), 36, 18, (3, 3), {"groups": 18, "stride": (2, 1), "dilation": (1, 2)}),
}
PLANES = [name for name, case in CASES.items() if len(case[1]) == 2 and case[0] > 0]


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    monkeypatch.setattr("test_masked_conv.CASES", CASES)


@pytest.mark.parametrize("case", CASES)
def test_matches_closed_form(case):
    (x, weight, scores), mask, bias, options = problem(case)
    y = MASKED[x.dim() - 2](x, weight, scores, mask, bias, **options, backend="fused")
    dscores = assert_right(y, x, weight, scores, mask, bias, options, torch.float32)[2]
    assert y.is_contiguous() and dscores.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["1d all", "2d all", "wide, all", "wide 1x1", "depthwise", "in parts"])
def test_half_precision(case, dtype):
    (x, weight, scores), mask, bias, options = problem(case, dtype)
    y = MASKED[x.dim() - 2](x, weight, scores, mask, bias, **options, backend="fused")
    dx, dweight, dscores, dbias = assert_right(y, x, weight, scores, mask, bias, options, dtype)
    assert y.dtype == dx.dtype == dweight.dtype == dbias.dtype == dtype and dscores.dtype == torch.float32


@pytest.mark.parametrize("like_y", [False, True])
@pytest.mark.parametrize("case", PLANES)
def test_channels_last(case, like_y):
    (x, weight, scores), mask, bias, options = problem(case, channels_last=True)
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert y.is_contiguous(memory_format=torch.channels_last)
    dx, _, dscores, _ = assert_right(y, x, weight, scores, mask, bias, options, torch.float32, like_y)
    assert dx.is_contiguous(memory_format=torch.channels_last) and dscores.is_contiguous()


# Of dense channels in half precision: outputs are written by descriptor, and some computed box by box.
DENSE = {
    "dense, padding": (3, (7, 5), 72, 48, (3, 3), {"padding": 1}),
    "dense, no padding": (2, (6, 6), 144, 144, (3, 2), {"dilation": (1, 2)}),
    "dense, 1x1": (2, (9, 9), 80, 72, (1, 1), {}),
    "dense, 1x1, stride": (3, (8, 9), 80, 72, (1, 1), {"stride": (2, 3)}),
    "dense, 1x1, uneven stride": (3, (9, 9), 80, 72, (1, 1), {"stride": 2}),
    "dense, far padding": (1, (3, 4), 16, 16, (2, 2), {"padding": 5, "dilation": 3}),
    "dense, one place": (1, (1, 1), 24, 16, (3, 3), {"padding": 1}),
    "dense, many images": (70, (2, 2), 16, 16, (3, 3), {"padding": 1}),
    "dense, empty batch": (0, (5, 5), 16, 16, (3, 3), {"padding": 1}),
    "dense, few inputs": (2, (9, 9), 72, 3, (3, 3), {"padding": 2, "dilation": 2}),
    "dense, stride": (2, (9, 9), 72, 48, (3, 3), {"padding": 1, "stride": 2}),
    "dense, groups": (1, (5, 4), 32, 64, (3, 3), {"padding": 1, "groups": 2}),
}

UNBOXED = {
    "dense, 1x1, uneven stride",
    "dense, empty batch",
    "dense, few inputs",
    "dense, stride",
    "dense, groups",
}


@pytest.mark.parametrize(
    "case, choice",
    [(case, i) for case in DENSE for i in (range(7) if case == "dense, no padding" else (0, 6))],
)
def test_dense_channels_in_half_precision(case, choice, monkeypatch):
    """Whichever configuration is chosen; of shorter lists, the last; in whatever order y's gradient comes."""
    served_by_boxes = set()

    def choose(op, key, configs, run):
        served_by_boxes.add(any(map(is_boxed, configs)))
        return configs[min(choice, len(configs) - 1)]

    monkeypatch.setattr("test_masked_conv.CASES", DENSE)
    monkeypatch.setattr(kernels, "choose", choose)
    (x, weight, scores), mask, bias, options = problem(case, torch.bfloat16, channels_last=True)
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    dx = assert_right(y, x, weight, scores, mask, bias, options, torch.bfloat16, like_y=choice > 0)[0]
    assert all(t.is_contiguous(memory_format=torch.channels_last) or t.numel() == 0 for t in (y, dx))
    assert served_by_boxes == {case not in UNBOXED}


def test_large_tiles_are_left_out_where_the_weight_wants_a_gradient(monkeypatch):
    """They spill there."""
    large = {}

    def choose(op, key, configs, run):
        if op == "masked_conv_weight_grads":
            large[weight.requires_grad] = sum(map(is_large, configs))
        return configs[0]

    monkeypatch.setattr("test_masked_conv.CASES", DENSE)
    monkeypatch.setattr(kernels, "choose", choose)
    (x, weight, scores), mask, _, options = problem("dense, no padding", torch.bfloat16, channels_last=True)
    for wanted in (True, False):
        weight.requires_grad_(wanted)
        masked_conv2d(x, weight, scores, mask, **options, backend="fused").sum().backward()
    assert large[True] == 0 < large[False]


def test_boxes_serve_scores_of_a_float32_weight(monkeypatch):
    """What is multiplied has 16 bits, as under autocast."""
    monkeypatch.setattr("test_masked_conv.CASES", DENSE)
    monkeypatch.setattr(kernels, "choose", lambda op, key, configs, run: next(filter(is_boxed, configs)))
    (x, weight, _), _, _, options = problem("dense, padding", torch.bfloat16, channels_last=True)
    stride, dilation, _, pads = geometry(x, weight, options)
    grad = torch.randn(3, 72, 7, 5).bfloat16().to(memory_format=torch.channels_last)
    window = {"stride": stride, "padding": [a for a, _ in pads], "dilation": dilation}
    precise = weight.detach().float() + torch.rand(weight.shape) / 1000
    ours, wanted = torch.ones(weight.shape), torch.ones(weight.shape)
    masked_conv2d_score_grad_(ours, grad, x.detach(), precise, **window, backend="fused")
    masked_conv2d_score_grad_(wanted, grad.float(), x.detach().float(), precise, **window, backend="dense")
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("places", [1, 64, 256])
def test_boxes_are_the_fewest(places):
    for size in [(1, 1, 1), (256, 7, 7), (4, 8, 32), (8, 56, 56), (128, 14, 14), (2, 1, 1000)]:
        others = product(*([2**i for i in range(places.bit_length())] for _ in range(3)))
        others = [box for box in others if math.prod(box) == places]
        box = box_of(*size, places)
        assert box in others and num_boxes(size, box) == min(num_boxes(size, other) for other in others)
        whole = box_of(*size, places, whole=True)
        assert whole in others and size[1] % whole[1] == size[2] % whole[2] == 0


def test_batches_of_about_one_size_have_one_box():
    """A kernel is compiled for a box."""
    assert len({box_of(n, 7, 14, 128) for n in range(65, 129)}) == 1


def test_what_no_window_sees_is_in_no_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda op, key, configs, run: next(filter(is_boxed, configs)))
    x, weight = torch.ones(1, 16, 8, 8).bfloat16(), torch.ones(16, 16, 2, 2).bfloat16()
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    x[..., 3, 3] = torch.inf
    scores = torch.ones(weight.shape, requires_grad=True)
    y = masked_conv2d(x, weight, scores, weight > 0, dilation=5, backend="fused")
    grad = torch.autograd.grad(y, scores, torch.ones_like(y))[0]
    assert torch.equal(grad, torch.full(weight.shape, 9.0))


@pytest.mark.parametrize("case", ["wide", "wide 1x1", "depthwise"])
def test_a_bias_may_have_any_stride(case):
    (x, weight, scores), mask, bias, options = problem(case)
    spread = torch.randn(2 * len(bias))[::2].requires_grad_()
    for each in (spread, torch.randn(1).expand(len(bias)).requires_grad_()):
        y = masked_conv2d(x, weight, scores, mask, each, **options, backend="fused")
        assert_right(y, x, weight, scores, mask, each, options, torch.float32)


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("case", ["wide, all", "wide 1x1", "depthwise"])
def test_one_operand_is_channels_last(case, of_x):
    (x, weight, scores), mask, bias, options = problem(case)
    last = x if of_x else weight
    last.data = last.data.to(memory_format=torch.channels_last)
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, options, torch.float32)


@pytest.mark.parametrize("case", ["2d", "wide 1x1"])
def test_strides_do_not_matter(case):
    (x, weight, scores), mask, bias, options = problem(case)
    x = torch.randn(*x.shape[:3], 2 * x.shape[3])[..., ::2].requires_grad_()
    weight = torch.randn(weight.shape[::-1]).permute(3, 2, 1, 0).requires_grad_()
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, options, torch.float32)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", ["2d all", "wide", "depthwise"])
def test_nothing_or_everything_pruned(case, keep):
    (x, weight, scores), mask, bias, options = problem(case)
    mask = torch.full_like(mask, keep)
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, options, torch.float32)


@pytest.mark.parametrize("case", ["2d", "wide", "wide 1x1", "depthwise"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_of_an_expanded_sum(case, channels_last):
    (x, weight, scores), mask, bias, options = problem(case, channels_last=channels_last)
    inputs = x, weight, scores, bias
    y = masked_conv2d(*inputs[:3], mask, bias, **options, backend="fused")
    grads = torch.autograd.grad(y.sum(), inputs)
    stride, dilation, groups, pads = geometry(x, weight, options)
    padding = [before for before, _ in pads]
    wanted = reference.masked_conv(x, weight, scores, mask, bias, stride, padding, dilation, groups)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "lists, kind, i",
    [
        (lists, kind, i)
        for lists in ("FORWARD_CONFIGS", "INPUT_CONFIGS", "WEIGHT_CONFIGS")
        for kind, configs in getattr(kernels, lists).items()
        for i in range(len(configs))
    ],
)
def test_every_configuration(lists, kind, i, monkeypatch):
    table = getattr(kernels, lists)
    monkeypatch.setattr(kernels, lists, {key: [table[kind][i]] for key in table})
    monkeypatch.setattr(kernels, "is_large", lambda config: False)  # they are right, too, if slow
    (x, weight, scores), mask, bias, options = problem("wide")
    y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, options, torch.float32)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 2, 3), (2, 64, 1, 1), (5, 33, 1, 1), (4, 70, 2, 2), (40, 32, 3, 1)])
def test_realigned_words(shape, flat):
    mask = torch.rand(shape) < 0.5
    rows = mask.flatten(1)[:, None] if flat else mask.flatten(2).transpose(1, 2)  # [O, TAPS, C]
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[2] % 32))
    words = kernels._realigned(pack_mask(mask), torch.empty(shape), flat)
    assert torch.equal(words, pack_mask(padded.contiguous()))


def test_tiles_that_need_hopper_are_left_out_before(monkeypatch):
    class Images:
        dtype, device = torch.bfloat16, torch.device("cuda", 0)

    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        widest = max(c.values["BLOCK_N"] for c in kernels._pick(kernels.FORWARD_CONFIGS, Images, False))
        assert widest == (256 if capability >= (9, 0) else 128)


@pytest.mark.parametrize("case", ["wide", "in parts"])
def test_timing_adds_nothing_to_the_scores(case, monkeypatch):
    monkeypatch.setattr(kernels, "choose", timed)
    (x, weight, _), _, _, options = problem(case)
    stride, dilation, groups, pads = geometry(x, weight, options)
    window = {"stride": stride, "padding": [a for a, _ in pads], "dilation": dilation, "groups": groups}
    grad = torch.randn(reference.masked_conv(x, weight, weight, weight > 0, None, *window.values()).shape)
    written, sums = torch.empty(weight.shape), torch.ones(weight.shape)
    masked_conv2d_score_grad_(written, grad, x, weight, **window, accumulate=False, backend="fused")
    masked_conv2d_score_grad_(sums, grad, x, weight, **window, backend="fused")
    torch.testing.assert_close(sums, 1 + written)


def test_images_beyond_32_bits():
    """Images lie so far apart that offsets between them need 64 bits; the memory in between is never used."""
    x, weight = torch.randn(3, 3, 4, 4).bfloat16(), torch.randn(4, 3, 3, 3).bfloat16()
    mask, scores = weight > 0, torch.randn(weight.shape, requires_grad=True)
    results = []
    for images, backend in ((spread_out(x, 2**30 + 16), "fused"), (x, "dense")):
        y = masked_conv2d(images, weight, scores, mask, backend=backend)
        results.append((y, *torch.autograd.grad(y.float().sum(), scores)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["in parts", "wide, in parts", "depthwise"])
def test_repeats_bit_for_bit(case):
    (x, weight, scores), mask, bias, options = problem(case)

    def run():
        y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
        return y, *torch.autograd.grad(y.square().sum(), (x, weight, scores, bias))

    assert all(map(torch.equal, run(), run()))


def test_sums_in_parts_have_parts():
    block = 32
    for places in (1, 127, 128, 129, 5000, 10**9):
        num_parts, part = split_sum(places, 100, 3, block)
        assert part % block == 0 and (num_parts - 1) * part < places <= num_parts * part
    assert split_sum(3 * 12 * 13, 100, 1, block)[0] > 2
    assert split_sum(0, 100, 1, block) == (1, block)
    assert split_sum(10**6, 2**20, 1, block)[0] == 2


@pytest.mark.parametrize("case", ["1d", "2d all", "wide 1x1", "depthwise"])
def test_mixed_is_dense_but_for_the_gradients_of_scores_and_weight(case):
    (x, weight, scores), mask, bias, options = problem(case)
    inputs = x, weight, scores, bias
    masked = MASKED[x.dim() - 2]

    def results(backend):
        y = masked(x, weight, scores, mask, bias, **options, backend=backend)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
        return y, *torch.autograd.grad(y, inputs, grad)

    dense, fused, mixed = map(results, ("dense", "fused", "mixed"))
    assert all(map(torch.equal, mixed[:2], dense[:2]))
    assert all(map(torch.equal, mixed[2:], fused[2:]))


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (1, 2)], ids=str)
def test_only_what_is_asked_for_is_computed(needs):
    tensors, mask, bias, options = problem("2d all")
    learning = [*tensors, bias]
    for i, tensor in enumerate(learning):
        tensor.requires_grad_(i in needs)
    x, weight, scores = tensors
    masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused").sum().backward()
    assert [tensor.grad is not None for tensor in learning] == [i in needs for i in range(4)]


def test_not_finite_weights_that_are_pruned_stay_out():
    for case in ("2d", "wide", "depthwise"):
        (x, weight, scores), mask, bias, options = problem(case)
        with torch.no_grad():
            weight[0, 0] = torch.inf
        mask[0, 0] = False
        y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["fused", "dense"])
@pytest.mark.parametrize("case", ["2d all", "wide 1x1", "wide, in parts", "depthwise"])
def test_score_gradient_is_added_in_place(case, backend):
    (x, weight, _), mask, bias, options = problem(case, channels_last=True)
    stride, dilation, groups, pads = geometry(x, weight, options)
    padding = [before for before, _ in pads]
    window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    grad = torch.randn(reference.masked_conv(x, weight, weight, mask, None, *window.values()).shape)
    plain_scores = plain(x, weight, mask, bias, grad, options)[3]
    arrays = map(double, (x, weight, mask, bias))
    truth = conv(*arrays, lambda _: double(grad), stride, dilation, groups, pads)[3]
    before = torch.randn(weight.shape)
    sums = before.clone()
    version = sums._version
    assert masked_conv2d_score_grad_(sums, grad, x, weight, **window, backend=backend) is sums
    assert sums._version > version
    assert_near(sums, before + plain_scores, double(before) + truth, torch.float32)
    written = torch.full_like(before, torch.nan)
    masked_conv2d_score_grad_(written, grad, x, weight, **window, accumulate=False, backend=backend)
    assert_near(written, plain_scores, truth, torch.float32)


def test_score_gradient_of_no_images_is_zero():
    for groups in (1, 4):
        weight = torch.randn(8, 4 // groups, 3, 3)
        sums = torch.full(weight.shape, torch.nan)
        grad, x = torch.ones(0, 8, 3, 3), torch.ones(0, 4, 5, 5)
        masked_conv2d_score_grad_(sums, grad, x, weight, groups=groups, accumulate=False, backend="fused")
        assert torch.equal(sums, torch.zeros(weight.shape))


@pytest.mark.parametrize("case", ["2d all", "wide 1x1"])
def test_autocast(case):
    (x, weight, scores), mask, bias, options = problem(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight, scores, mask, bias, **options, backend="fused")
    assert y.dtype == torch.bfloat16
    grads = assert_right(y, x, weight, scores, mask, bias, options, torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("backend", ["fused", "mixed"])
def test_second_derivative_raises(backend):
    (x, weight, scores), mask, bias, options = problem("2d")
    for wanted in (x, scores):
        y = masked_conv2d(x, weight, scores, mask, bias, **options, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="masked_conv can be differentiated only once"):
            grad.sum().backward()


@pytest.mark.parametrize("case, channels_last", [("2d", False), ("wide 1x1", True), ("depthwise", True)])
def test_opcheck(case, channels_last):
    (x, weight, scores), mask, bias, options = problem(case, channels_last=channels_last)
    stride, dilation, groups, pads = geometry(x, weight, options)
    window = stride, [before for before, _ in pads], dilation, groups
    words, ops = pack_mask(mask), torch.ops.jackpot
    x, weight, scores, bias = (t.detach() for t in (x, weight, scores, bias))
    grad = torch.randn_like(ops.masked_conv_fused(x, weight, words, bias, *window))
    opcheck(ops.masked_conv_fused.default, (x, weight, words, None, *window))
    shape = list(x.shape)
    opcheck(ops.masked_conv_fused_input_grad.default, (grad, weight, words, shape, channels_last, *window))
    for needs in ([True, True], [False, True]):
        opcheck(ops.masked_conv_fused_weight_grads.default, (grad, x, weight, words, needs, *window))
    opcheck(ops.masked_conv_fused_score_grad_.default, (scores, grad, x, weight, True, *window))


def network(backend):
    """The smallest ResNet of its kind, with a mask over every layer."""
    model = jk.convert(ResNet(depth=8))
    jk.initialize(model, 0.5, keep_last_dense=False)
    for layer in jk.masked_layers(model).values():
        layer.backend = backend
    return model


def gradients(model, x):
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(x).square().sum(), learning)


@pytest.mark.parametrize("backend", ["fused", "dense"])
def test_a_whole_resnet_compiles_in_one_graph(backend):
    model = network(backend).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last)
    eager = gradients(model, x)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_whole_resnet_has_the_gradients_of_dense_layers():
    x = torch.randn(2, 3, 6, 5)
    model = network("fused")
    ours = gradients(model, x)
    for layer in jk.masked_layers(model).values():
        assert layer.cached_effective_weight is None
        layer.backend = "dense"
    for our, their in zip(ours, gradients(model, x), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


def layer_and_input():
    layer = jk.MaskedConv2d(4, 6, 3, padding=1)
    layer.weight.requires_grad_(False)
    layer.mask = torch.rand(layer.weight.shape) < 0.5
    layer.backend = "fused"
    return layer, torch.randn(2, 4, 5, 6, requires_grad=True)


def test_layer_compiles_with_inductor():
    layer, x = layer_and_input()
    inputs = x, layer.scores, layer.bias

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().sum()

    eager = torch.autograd.grad(loss(x), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(compiled(x), inputs), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layer(reentrant):
    layer, x = layer_and_input()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.scores)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.scores.grad, wanted)


def test_distributed_data_parallel(tmp_path):
    layer, x = layer_and_input()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.scores)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(layer.scores.grad, wanted)


def test_unbatched():
    (x, weight, scores), mask, bias, options = problem("2d all")
    one = masked_conv2d(x[0], weight, scores, mask, bias, **options, backend="fused")
    batched = masked_conv2d(x[:1], weight, scores, mask, bias, **options, backend="fused")
    assert torch.equal(one, batched[0])


ONES = torch.ones
ERRORS = [
    ({"groups": 4}, ValueError, "groups must divide the 6 output channels of weight, got 4"),
    ({"mask": ONES(2).int()}, ValueError, "mask as words must have shape [4], got [2]"),
    ({"mask": ONES(8).int()[::2]}, ValueError, "mask as words must be contiguous, got strides [2]"),
    ({"mask": ONES(4).long()}, TypeError, "mask must be a bool tensor, or int32 words, got int64"),
    ({"x": ONES(2, 4, 6, 6).half()}, TypeError, "x must be float32, got float16"),
    ({"x": ONES(2, 4, 6, 6, device="meta")}, ValueError, "x must be on cpu, got meta"),
    ({"x": ONES(2, 5, 6, 6)}, ValueError, "x must have 4 or 3 dimensions and 4 channels"),
    (
        {"x": ONES(2, 4, 6, 2)},
        ValueError,
        "x must be as large as the window with its padding, got shape [2, 4, 6, 2]",
    ),
    ({"bias": ONES(6).half()}, TypeError, "bias must be float32, got float16"),
    ({"weight": ONES(6, 0, 3, 3)}, ValueError, "weight must have 4 dimensions, none of them empty"),
    (
        {"weight": ONES(6, 2, 3, 3).double(), "x": ONES(2, 4, 6, 6).double(), "bias": None},
        TypeError,
        'x must be float32, bfloat16 or float16 for backend="fused", got float64',
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_come_before_any_launch(change, error, message, monkeypatch):
    monkeypatch.setattr(kernels, "conv_fwd_kernel", None)
    monkeypatch.setattr(depthwise, "depthwise_fwd_kernel", None)
    arguments = {name: ONES(6, 2, 3, 3) for name in ("weight", "scores")}
    arguments |= {"x": ONES(2, 4, 6, 6), "mask": ONES(6, 2, 3, 3).bool(), "bias": ONES(6), "groups": 2}
    with pytest.raises(error) as caught:
        masked_conv2d(**arguments | change, backend="fused")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "weight, image, message",
    [
        ((4, 2, 3, 3), (9, 4, 2**14, 2**15), None),
        ((4, 2, 3, 3), (1, 4, 2**14, 2**15 + 1), "an image must span fewer than 2**31 elements"),
        ((2**20, 2**11, 1, 1), (1, 4, 5, 5), "weight must have fewer than 2**31 elements"),
    ],
)
def test_offsets_that_32_bits_do_not_hold(weight, image, message):
    tensors = [torch.empty(shape, device="meta") for shape in (weight, image)]
    if message is None:
        kernels._require_short_offsets(*tensors)
        return
    with pytest.raises(ValueError) as caught:
        kernels._require_short_offsets(*tensors)
    assert str(caught.value).startswith(f'{message} for backend="fused", got shape')


def test_a_weight_whose_rows_lie_far_apart_is_refused():
    x, mask, scores = ONES(1, 2, 3, 3), ONES(34, 2, 1, 1).bool(), ONES(34, 2, 1, 1)
    weight = spread_out(scores.bfloat16(), 2**26 + 16)
    with pytest.raises(ValueError, match="weight must span fewer than 2"):
        masked_conv2d(x.bfloat16(), weight, scores, mask, backend="fused")


def test_three_dimensions_have_no_kernel():
    tensors = ONES(1, 2, 3, 3, 3), ONES(2, 2, 3, 3, 3), ONES(2, 2, 3, 3, 3), ONES(2, 2, 3, 3, 3).bool()
    for backend in ("fused", "mixed"):
        with pytest.raises(ValueError) as caught:
            masked_conv3d(*tensors, backend=backend)
        assert str(caught.value) == (
            f'weight must have one or two window dimensions for backend="{backend}", got three: use "dense"'
        )
    assert masked_conv3d(*tensors).shape == (1, 2, 1, 1, 1)


SCORE_ERRORS = [
    ({"grad_scores": ONES(6, 2, 3, 3).half()}, TypeError, "grad_scores must be float32, got float16"),
    ({"grad": ONES(2, 6, 4, 3)}, ValueError, "grad must have shape [2, 6, 4, 4], got [2, 6, 4, 3]"),
    ({"grad": ONES(2, 6, 4, 4).half()}, TypeError, "grad must be float32, got float16"),
    ({"x": ONES(4, 6, 6)}, ValueError, "x must have 4 dimensions, got shape [4, 6, 6]"),
    ({"x": None}, TypeError, "x must be a floating-point tensor, got NoneType"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be one number or 2, got (1, 1, 1)"),
]


@pytest.mark.parametrize(
    "change, error, message", SCORE_ERRORS, ids=[message for *_, message in SCORE_ERRORS]
)
def test_errors_of_accumulation_change_nothing(change, error, message):
    arguments = {name: ONES(6, 2, 3, 3) for name in ("grad_scores", "weight")}
    arguments |= {"grad": ONES(2, 6, 4, 4), "x": ONES(2, 4, 6, 6), "groups": 2} | change
    with pytest.raises(error) as caught:
        masked_conv2d_score_grad_(**arguments, backend="fused")
    assert str(caught.value) == message
    assert (arguments["grad_scores"] == 1).all()
