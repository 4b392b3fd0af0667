"""The Triton kernels of the convolution on a device: numerics, repeatability, and a whole search."""

import pytest
import test_masked_conv
import torch
from closed_forms import assert_near, conv, double
from test_masked_conv import FLOATS, MASKED, geometry, plain, problem
from test_masked_conv_fused import CASES, DENSE
from torch import nn

import jackpot_kernels as jk
from jackpot_kernels import masked_conv2d, masked_conv2d_score_grad_, reference
from jackpot_kernels.kernels import masked_conv as kernels
from jackpot_kernels.models import ResNet

pytestmark = pytest.mark.gpu

# More than a block in every dimension, and the layouts that are copied 16 bytes at a time.
LARGE = {
    "64 channels": (8, (28, 28), 64, 64, (3, 3), {"padding": 1}),
    "stride": (8, (28, 28), 256, 128, (3, 3), {"padding": 1, "stride": 2}),
    "pointwise": (8, (14, 14), 512, 256, (1, 1), {}),
    "groups": (4, (14, 14), 256, 256, (3, 3), {"padding": 1, "groups": 4}),
    "depthwise": (8, (28, 28), 128, 128, (3, 3), {"padding": 1, "groups": 128}),
    "first": (8, (64, 64), 64, 3, (7, 7), {"padding": 3, "stride": 2}),
}
CASES = CASES | {f"large, {name}": case for name, case in LARGE.items()}


@pytest.fixture(autouse=True)
def on_device(monkeypatch, tmp_path):
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path))
    monkeypatch.setattr(test_masked_conv, "CASES", CASES | DENSE)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # Not for monkeypatch, which would delete what this object has in no dictionary.
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def device_problem(case, dtype, channels_last=False):
    tensors, mask, bias, options = problem(case, dtype, channels_last)
    moved = [t.detach().cuda().requires_grad_() for t in (*tensors, bias)]
    return moved[:3], mask.cuda(), moved[3], options


def results(tensors, mask, bias, grad, options, backend="fused"):
    x, weight, scores = tensors
    y = MASKED[x.dim() - 2](x, weight, scores, mask, bias, **options, backend=backend)
    grad = torch.randn_like(y) if grad is None else grad
    return (y, *torch.autograd.grad(y, (x, weight, scores, bias), grad)), grad


def assert_right_on_device(tensors, mask, bias, options, eps):
    """Compare a result and its gradients with the closed forms, by the error that PyTorch makes."""
    ours, grad = results(tensors, mask, bias, None, options)
    x, weight, _ = tensors
    theirs = plain(x, weight, mask, bias, grad, options)
    arrays = (double(t.cpu()) for t in (x, weight, mask, bias))
    truth = conv(*arrays, lambda _: double(grad.cpu()), *geometry(x, weight, options))
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert_near(our.cpu(), their.cpu(), true, eps)


@pytest.mark.parametrize(
    "case, dtype, channels_last, tf32",
    [
        (case, dtype, channels_last, tf32)
        for case in CASES
        for dtype in (FLOATS if case.startswith("large") else (torch.float32, torch.bfloat16))
        for channels_last in ((False, True) if len(CASES[case][1]) == 2 else (False,))
        for tf32 in ((True, False) if dtype == torch.float32 and case.startswith("large") else (True,))
    ],
)
def test_matches_closed_form(case, dtype, channels_last, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    # cuDNN may use full precision where it is allowed less.
    eps = torch.float16 if dtype == torch.float32 and tf32 else dtype
    assert_right_on_device(*device_problem(case, dtype, channels_last), eps)


@pytest.mark.parametrize("choice", range(7))
@pytest.mark.parametrize(
    "case",
    ["large, 64 channels", "large, stride", "dense, padding", "dense, far padding", "dense, 1x1, stride"],
)
def test_every_configuration_for_dense_channels(case, choice, monkeypatch):
    monkeypatch.setattr(
        kernels, "choose", lambda op, key, configs, run: configs[min(choice, len(configs) - 1)]
    )
    assert_right_on_device(*device_problem(case, torch.bfloat16, True), torch.bfloat16)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("large", "in parts"))])
def test_fifty_repeats_have_the_same_bits(case, channels_last):
    tensors, mask, bias, options = device_problem(case, torch.bfloat16, channels_last)
    first, grad = results(tensors, mask, bias, None, options)
    for _ in range(50):
        assert all(map(torch.equal, first, results(tensors, mask, bias, grad, options)[0]))


@pytest.mark.parametrize("case", [f"large, {name}" for name in LARGE])
def test_gradients_are_those_of_the_reference(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors, mask, bias, options = device_problem(case, torch.float32, True)
    ours, grad = results(tensors, mask, bias, None, options)
    wanted, _ = results(tensors, mask, bias, grad, options, "reference")
    for our, their in zip(ours, wanted, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4 * their.abs().max().item())


@pytest.mark.parametrize("case", ["large, 64 channels", "large, pointwise", "large, depthwise"])
def test_score_gradient_is_added_once_while_configurations_are_timed(case):
    (x, weight, scores), mask, _, options = device_problem(case, torch.bfloat16, True)
    stride, dilation, groups, pads = geometry(x, weight, options)
    window = {"stride": stride, "padding": [a for a, _ in pads], "dilation": dilation, "groups": groups}
    grad = torch.randn_like(reference.masked_conv(x, weight, scores, mask, None, *window.values()))
    written = masked_conv2d_score_grad_(
        torch.empty_like(scores), grad, x, weight, **window, accumulate=False, backend="fused"
    )
    sums = torch.ones_like(scores)
    masked_conv2d_score_grad_(sums, grad, x, weight, **window, backend="fused")
    # Adding may be the fastest in another configuration, which sums in another order.
    torch.testing.assert_close(sums, 1 + written, rtol=1e-4, atol=1e-4 * written.abs().max().item())


def test_a_captured_graph_replays_the_same_bits():
    tensors, mask, bias, options = device_problem("large, 64 channels", torch.bfloat16, True)
    x, weight, scores = (t.detach() for t in tensors)
    words = jk.pack_mask(mask)
    wanted = masked_conv2d(x, weight, scores, words, bias, **options, backend="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_conv2d(x, weight, scores, words, bias, **options, backend="fused")
    y.detach().zero_()
    graph.replay()
    assert torch.equal(y, wanted)


def search(backend, steps=200):
    """Return masks and losses of a search on random images, whose gradients the backend computes."""
    torch.manual_seed(0)
    model = jk.convert(ResNet(depth=8))
    jk.initialize(model, 0.8)
    model = model.cuda().to(memory_format=torch.channels_last)
    for layer in jk.masked_layers(model).values():
        layer.backend = backend
    optimizer = jk.SRPopup(model, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 3, 16, 16, generator=generator).cuda()
        target = torch.randint(10, (64,), generator=generator).cuda()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {name: layer.mask for name, layer in jk.masked_layers(model).items()}, torch.stack(losses)


def test_a_search_with_fused_layers_and_one_with_dense_layers(record_property):
    """Sums in another order give scores that differ in their last bits, and those near a threshold swap."""
    (fused, fused_losses), (dense, dense_losses) = search("fused"), search("dense")
    again, _ = search("fused")
    assert all(torch.equal(mask, again[name]) for name, mask in fused.items())
    for name, mask in fused.items():
        assert mask.sum() == dense[name].sum()
        differing = (mask != dense[name]).sum().item() / (2 * mask.sum().item())
        record_property(f"share of kept weights that differ in {name}", differing)
        print(f"{name}: {differing:.2%} of the kept weights differ")
    torch.testing.assert_close(fused_losses[:3], dense_losses[:3], rtol=1e-2, atol=1e-2)
    assert abs(fused_losses[-20:].mean() - dense_losses[-20:].mean()) < 0.1
