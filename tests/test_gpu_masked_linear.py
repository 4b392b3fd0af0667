"""The fused masked matmul on the device: numerics, gradients, repeatability, graphs."""

import pytest
import torch
from test_masked_linear import FLOATS, SHAPES, problem
from test_masked_linear_fused import SIZES

import jackpot_kernels as jk
from jackpot_kernels import masked_linear, masked_linear_score_grad_, pack_mask, reference
from jackpot_kernels.kernels import masked_linear as kernels
from jackpot_kernels.kernels.tuning import HOPPER

pytestmark = pytest.mark.gpu

LARGE = [((4, 300), 1000, 784), ((7,), 4096, 4096), ((50,), 768, 3072), ((2048,), 1024, 1024)]


@pytest.fixture(autouse=True)
def own_cache_and_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path))
    # Not for monkeypatch, which would delete what this object has in no dictionary.
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def on_device(*args, **options):
    """Return leaves on the device, and the mask there."""
    tensors = [t.detach().cuda().requires_grad_(t.requires_grad) for t in problem(*args, **options)]
    return tuple(tensors)


def assert_right_on_device(y, tensors, dtype):
    """Compare with the closed forms; PyTorch's own error is that of the device."""
    x, weight, scores, mask, bias = tensors
    grad = torch.randn(y.shape, device="cuda").to(y.dtype)
    inputs = x, weight, scores, bias
    ours = y, *torch.autograd.grad(y, inputs, grad)
    effective = (weight.detach() * mask).to(x.dtype)
    their_y = torch.nn.functional.linear(x, effective, bias)
    rows, g_inputs = grad.reshape(-1, weight.shape[0]), x.detach().reshape(-1, weight.shape[1])
    g = rows.t() @ g_inputs
    theirs = their_y, grad @ effective, g * mask, g.float() * weight.detach().float(), rows.sum(0)
    wide = [t.detach().double() for t in (x, weight, bias, grad)]
    x64, w64, b64, grad64 = wide
    g64 = grad64.reshape(-1, len(w64)).t() @ x64.reshape(-1, w64.shape[1])
    y64 = x64 @ (w64 * mask).t() + b64
    truth = y64, grad64 @ (w64 * mask), g64 * mask, g64 * w64, grad64.reshape(-1, len(w64)).sum(0)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        if true.numel():
            error, their_error = ((t.double() - true).abs().max().item() for t in (our, their))
            floor = 2 * torch.finfo(dtype).eps * true.abs().max().item()
            assert error <= 2 * their_error + floor


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES + SIZES + LARGE, ids=str)
def test_matches_closed_form(shape, dtype):
    tensors = on_device(*shape, dtype)
    assert_right_on_device(masked_linear(*tensors, backend="fused"), tensors, dtype)


def test_tf32_follows_the_setting():
    tensors = x, weight, _, mask, bias = on_device((256,), 256, 1024)
    truth = x.double() @ (weight * mask).double().t() + bias.double()

    def error():
        return (masked_linear(*tensors, backend="fused").double() - truth).abs().max().item()

    exact = error()
    torch.backends.cuda.matmul.allow_tf32 = True
    assert exact < 1e-3 < error()


@pytest.mark.parametrize("lists", ["MATMUL_CONFIGS", "GRADS_CONFIGS"])
@pytest.mark.parametrize("shape", [((5,), 48, 160), ((70,), 150, 45)], ids=str)
def test_every_configuration(lists, shape, monkeypatch):
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    served = [name for name in getattr(kernels, lists) if hopper or not name.endswith(HOPPER)]
    for config in [config for name in served for config in getattr(kernels, lists)[name]]:
        monkeypatch.setattr(kernels, lists, {name: [config] for name in getattr(kernels, lists)})
        aligned = ((70,), 144, 96)  # what a descriptor wants
        tensors = on_device(*(aligned if config.values["DESCRIPTORS"] else shape), torch.bfloat16)
        assert_right_on_device(masked_linear(*tensors, backend="fused"), tensors, torch.bfloat16)


@pytest.mark.parametrize("tokens", [3, 64, 777])
def test_fifty_repeats_are_bit_identical(tokens):
    tensors = on_device((tokens,), 640, 1024, torch.bfloat16)
    inputs = [t for t in tensors if t.requires_grad]

    def run():
        y = masked_linear(*tensors, backend="fused")
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    first = run()
    for _ in range(50):
        assert all(map(torch.equal, first, run()))


def test_gradients_equal_those_of_the_reference():
    tensors = on_device((130,), 96, 320)
    inputs = [t for t in tensors if t.requires_grad]
    wanted = torch.autograd.grad(reference.masked_linear(*tensors).square().sum(), inputs)
    ours = torch.autograd.grad(masked_linear(*tensors, backend="fused").square().sum(), inputs)
    for our, their in zip(ours, wanted, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-2)


def test_score_gradient_is_added_in_place():
    x, weight, _, _, _ = (t.detach() for t in on_device((2, 700), 96, 320, torch.bfloat16))
    grad = torch.randn(2, 700, 96, device="cuda").bfloat16()
    before = torch.randn(96, 320, device="cuda")
    sums = before.clone()
    masked_linear_score_grad_(sums, grad, x, weight, backend="fused")
    g = grad.view(-1, 96).double().t() @ x.view(-1, 320).double()
    torch.testing.assert_close(sums.double(), before + g * weight.double(), rtol=1e-4, atol=1e-2)


def test_step_is_captured_in_a_graph():
    x, weight, scores, mask, bias = on_device((64,), 96, 320, torch.bfloat16)
    words = pack_mask(mask)

    def run():
        y = masked_linear(x, weight, scores, words, bias, backend="fused")
        # What holds a graph of autograd ties later ones to the stream that it was made on.
        return y.detach(), *torch.autograd.grad(y.float().sum(), (x, scores))

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(map(torch.equal, captured, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_compiles_in_one_graph(backend):
    layer = jk.MaskedLinear(64, 24, device="cuda")
    layer.weight.requires_grad_(False)
    layer.backend = "fused"
    x = torch.randn(6, 64, device="cuda", requires_grad=True)
    inputs = x, layer.scores, layer.bias

    def loss(x):
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x).float().square().sum()

    eager = torch.autograd.grad(loss(x), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for ours, theirs in zip(torch.autograd.grad(compiled(x), inputs), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fused_needs_less_memory_than_dense():
    def peak(backend):
        layer = jk.MaskedLinear(8192, 8192, bias=False, device="cuda", dtype=torch.bfloat16)
        layer.weight.requires_grad_(False)
        layer.backend = backend
        x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        layer(x).sum().backward()
        return torch.cuda.max_memory_allocated() - start

    effective_weight_bytes = 2 * 8192 * 8192
    assert peak("dense") - peak("fused") >= effective_weight_bytes
