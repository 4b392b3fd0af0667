"""The Triton kernels through the public functions, in Triton's interpreter."""

import pytest
import torch
from closed_forms import assert_near, double, linear
from test_masked_linear import FLOATS, SHAPES, assert_right, problem
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import jackpot_kernels as jk
from jackpot_kernels import masked_linear, masked_linear_score_grad_, pack_mask, reference
from jackpot_kernels.kernels import masked_linear as kernels
from jackpot_kernels.kernels.tuning import HOPPER

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_gpu_masked_linear.py runs the kernels on the device"
)

SIZES = [  # besides those of the other backends: more than a block, and whole words or not
    ((16,), 16, 32),
    ((17,), 48, 64),
    ((3, 23), 67, 96),
    ((130,), 131, 37),
    ((65,), 16, 160),
]


def timed(op, key, configs, run):
    """Choose a configuration as on a device, where each is launched several times."""
    for config in configs:
        run(config)
        run(config)
    return configs[-1]


def spread_out(tensor, stride):
    """Return a copy whose first dimension has a stride; the memory in between is not written."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        far = torch.empty_strided(tensor.shape, (stride, *tensor.stride()[1:]), dtype=tensor.dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return far.copy_(tensor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES + SIZES, ids=str)
def test_matches_closed_form(shape, dtype):
    x, weight, scores, mask, bias = problem(*shape, dtype)
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert y.dtype == dtype and y.is_contiguous()
    grads = assert_right(y, x, weight, scores, mask, bias, dtype)
    assert grads[id(scores)].dtype == torch.float32 and grads[id(scores)].is_contiguous()
    assert grads[id(weight)].dtype == grads[id(x)].dtype == grads[id(bias)].dtype == dtype


@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("shape", [((6,), 5, 9), ((6,), 16, 64)], ids=str)
def test_nothing_or_everything_pruned(shape, keep):
    x, weight, scores, mask, bias = problem(*shape, keep=keep)
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, torch.float32)


@pytest.mark.parametrize("shape", [((5,), 48, 160), ((70,), 150, 45)], ids=str)
@pytest.mark.parametrize(
    "lists, config",
    [
        pytest.param(lists, config, id=f"{lists}-{name}-{i}")
        for lists in ("MATMUL_CONFIGS", "GRADS_CONFIGS")
        for name, configs in getattr(kernels, lists).items()
        for i, config in enumerate(configs)
    ],
)
def test_every_configuration(lists, config, shape, monkeypatch):
    if config.values["DESCRIPTORS"]:
        shape = (70,), 144, 96  # a descriptor wants aligned rows
    monkeypatch.setattr(kernels, lists, {name: [config] for name in getattr(kernels, lists)})
    x, weight, scores, mask, bias = problem(*shape)
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, torch.float32)


@pytest.mark.parametrize("inputs", [64, 45])
def test_strides_do_not_matter(inputs):
    _, _, scores, _, bias = problem((6, 4), 16, inputs)
    wide = torch.randn(6, 4, 2 * inputs)[..., ::2].requires_grad_()
    turned = torch.randn(inputs, 16).t().requires_grad_()
    mask = (torch.rand(inputs, 16) < 0.5).t()
    y = masked_linear(wide, turned, scores, mask, bias, backend="fused")
    grads = assert_right(y, wide, turned, scores, mask, bias, torch.float32)
    assert grads[id(scores)].is_contiguous()


def test_a_bias_may_have_any_stride():
    x, weight, scores, mask, _ = problem((7,), 16, 64)
    for each in (torch.randn(32)[::2].requires_grad_(), torch.randn(1).expand(16).requires_grad_()):
        y = masked_linear(x, weight, scores, mask, each, backend="fused")
        assert_right(y, x, weight, scores, mask, each, torch.float32)


def test_one_weight_may_have_any_strides():
    """Torch takes it for contiguous, whatever they are."""
    x, _, scores, mask, bias = problem((3,), 1, 1)
    weight = torch.randn(1, 1).as_strided((1, 1), (2, 2)).requires_grad_()
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, torch.float32)


@pytest.fixture
def descriptors_first(monkeypatch):
    """Let configurations with descriptors be chosen, where they may."""
    for lists in ("MATMUL_CONFIGS", "GRADS_CONFIGS"):
        table, kind = getattr(kernels, lists), "many tokens" + HOPPER
        monkeypatch.setitem(table, kind, sorted(table[kind], key=lambda c: -c.values["DESCRIPTORS"]))


def test_descriptors_are_only_made_of_whole_rows(descriptors_first):
    dtype = torch.bfloat16
    _, _, scores, mask, bias = problem((80,), 16, 32, dtype)
    x, weight = (torch.randn(32, size).to(dtype).t().requires_grad_() for size in (80, 16))
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, dtype)


def test_descriptors_are_only_made_of_aligned_rows(descriptors_first):
    """The gradient of one output is a column, which counts as a row of one, too."""
    dtype = torch.bfloat16
    x, weight, scores, mask, bias = problem((100,), 1, 64, dtype)
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert_right(y, x, weight, scores, mask, bias, dtype)


@pytest.mark.parametrize("inputs", [32, 45])
def test_rows_beyond_32_bits(inputs):
    x, weight, scores, mask, bias = (t.detach() for t in problem((34,), 16, inputs, torch.bfloat16))
    far = spread_out(x, 2**26 + 16)
    scores.requires_grad_()
    y = masked_linear(far, weight, scores, mask, bias, backend="fused")
    torch.testing.assert_close(y, masked_linear(x, weight, scores, mask, bias, backend="dense"))
    (dscores,) = torch.autograd.grad(y.sum(), scores)
    torch.testing.assert_close(dscores, x.float().sum(0) * weight.float(), rtol=1e-4, atol=1e-4)


def test_choice_for_whole_rows_is_not_used_for_others(monkeypatch):
    seen = []

    def choose(op, key, configs, run):
        seen.append((op, key, any(config.values["DESCRIPTORS"] for config in configs)))
        return configs[0]

    monkeypatch.setattr(kernels, "choose", choose)
    weight = torch.randn(16, 32).bfloat16().requires_grad_()
    mask, scores = weight > 0, torch.randn(16, 32, requires_grad=True)
    for x in (torch.randn(80, 32), torch.randn(32, 80).t()):
        y = masked_linear(x.bfloat16(), weight.detach(), scores, mask, backend="fused")
        y.backward(torch.randn(80, 16).bfloat16())
    engine = [uses for _, _, uses in seen]
    assert engine == [True, True, False, False]
    assert len({(op, key) for op, key, _ in seen}) == 4


@pytest.mark.parametrize("tokens", [5, 70])
def test_timing_adds_nothing_to_the_scores(tokens, monkeypatch):
    monkeypatch.setattr(kernels, "choose", timed)
    x, weight = torch.randn(tokens, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    grad = torch.randn(tokens, 16).bfloat16()
    written, sums = torch.empty(16, 64), torch.ones(16, 64)
    masked_linear_score_grad_(written, grad, x, weight, accumulate=False, backend="fused")
    masked_linear_score_grad_(sums, grad, x, weight, backend="fused")
    torch.testing.assert_close(sums, 1 + written)


def test_gradient_of_an_expanded_sum():
    x, weight, scores, mask, bias = problem((3, 4), 5, 9)
    masked_linear(x, weight, scores, mask, bias, backend="fused").sum().backward()
    truth = linear(*map(double, (x, weight, mask, bias, torch.ones(3, 4, 5))))
    for tensor, true in zip((x, weight, scores, bias), truth[1:], strict=True):
        assert_near(tensor.grad, tensor.grad, true, torch.float32)


def test_gradients_equal_those_of_the_reference():
    x, weight, scores, mask, bias = problem((19,), 12, 70)
    inputs = x, weight, scores, bias
    wanted = torch.autograd.grad(
        reference.masked_linear(x, weight, scores, mask, bias).square().sum(), inputs
    )
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mixed_is_dense_but_for_the_gradients_of_scores_weight_and_bias(dtype):
    x, weight, scores, mask, bias = problem((2, 9), 12, 70, dtype)
    inputs = x, weight, scores, bias

    def results(backend):
        y = masked_linear(x, weight, scores, mask, bias, backend=backend)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        return y, *torch.autograd.grad(y, inputs, grad)

    dense, fused, mixed = map(results, ("dense", "fused", "mixed"))
    assert all(map(torch.equal, mixed[:2], dense[:2]))
    assert all(map(torch.equal, mixed[2:], fused[2:]))


def test_mixed_layer_keeps_its_effective_weight():
    layer, x = layer_and_input()
    layer.backend = "mixed"
    layer(x).sum().backward()
    kept = layer.cached_effective_weight
    assert kept is not None and layer.effective_weight() is kept
    wanted = torch.autograd.grad(
        masked_linear(x, layer.weight, layer.scores, layer.mask, layer.bias, backend="fused").sum(),
        layer.scores,
    )
    assert torch.equal(layer.scores.grad, wanted[0])


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (0, 3), (2, 3)], ids=str)
def test_only_what_is_asked_for_is_computed(needs):
    tensors = x, weight, scores, mask, bias = problem((3,), 5, 9)
    learning = [t for t in tensors if t.requires_grad]
    for i, tensor in enumerate(learning):
        tensor.requires_grad_(i in needs)
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert len(assert_right(y, x, weight, scores, mask, bias, torch.float32)) == len(needs)
    masked_linear(x, weight, scores, mask, bias, backend="fused").sum().backward()
    assert [t.grad is not None for t in learning] == [i in needs for i in range(4)]


def test_not_finite_weights_that_are_pruned_stay_out():
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    with torch.no_grad():
        weight[0, 0] = torch.inf
    mask[0, 0] = False
    y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_split_columns_repeat_bit_for_bit():
    x, weight, scores, mask, bias = problem((3,), 40, 1024, torch.bfloat16)
    splits = [config.values["SPLITS"] for config in kernels.MATMUL_CONFIGS["tokens <= 16" + HOPPER]]
    assert splits[0] > 1
    first, second = (masked_linear(x, weight, scores, mask, bias, backend="fused") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["fused", "mixed", "dense", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_score_gradient_is_added_in_place(dtype, backend):
    x, weight, _, mask, bias = (t.detach() for t in problem((2, 37), 17, 45, dtype))
    grad = torch.randn(2, 37, 17).to(dtype)
    truth = linear(*map(double, (x, weight, mask, bias, grad)))[3]
    plain = (grad.view(-1, 17).t() @ x.view(-1, 45)).float() * weight.float()
    before = torch.randn(17, 45)
    sums = before.clone()
    version = sums._version
    assert masked_linear_score_grad_(sums, grad, x, weight, backend=backend) is sums
    assert sums._version > version
    assert_near(sums, before + plain, double(before) + truth, dtype)
    written = torch.full_like(before, torch.nan)
    masked_linear_score_grad_(written, grad, x, weight, accumulate=False, backend=backend)
    assert_near(written, plain, truth, dtype)


def test_score_gradient_of_the_reference_runs_no_kernel():
    """Which takes no float64."""
    x, weight, grad = (torch.randn(size, dtype=torch.float64) for size in ((6, 9), (5, 9), (6, 5)))
    sums = masked_linear_score_grad_(torch.zeros(5, 9), grad, x, weight, backend="reference")
    torch.testing.assert_close(sums, ((grad.t() @ x) * weight).float())


def test_score_gradient_of_no_tokens_is_zero():
    sums = torch.full((5, 9), torch.nan)
    grad, x = torch.ones(0, 5), torch.ones(0, 9)
    masked_linear_score_grad_(sums, grad, x, torch.randn(5, 9), accumulate=False, backend="fused")
    assert torch.equal(sums, torch.zeros(5, 9))


def test_autocast():
    x, weight, scores, mask, bias = problem((6,), 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, scores, mask, bias, backend="fused")
    assert y.dtype == torch.bfloat16
    grads = assert_right(y, x, weight, scores, mask, bias, torch.bfloat16)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("backend", ["fused", "mixed"])
def test_second_derivative_raises(backend):
    x, weight, scores, mask, bias = problem((3,), 5, 9)
    for wanted in (x, scores):
        y = masked_linear(x, weight, scores, mask, bias, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="masked_linear can be differentiated only once"):
            grad.sum().backward()


def test_opcheck():
    x, weight, scores, mask, bias = (t.detach() for t in problem((2, 3), 5, 9))
    words, grad = pack_mask(mask), torch.randn(2, 3, 5)
    ops = torch.ops.jackpot
    opcheck(ops.masked_linear_fused.default, (x, weight, words, bias))
    opcheck(ops.masked_linear_fused.default, (x, weight, words, None))
    opcheck(ops.masked_linear_fused_input_grad.default, (grad, weight, words))
    for needs in ([True] * 3, [False, True, False], [True, False, False]):
        opcheck(ops.masked_linear_fused_weight_grads.default, (grad, x, weight, words, needs))
    for accumulate in (True, False):
        opcheck(ops.masked_linear_fused_score_grad_.default, (scores, grad, x, weight, accumulate))


def layer_and_input(dtype=torch.float32):
    layer = jk.MaskedLinear(64, 24, dtype=dtype)
    layer.weight.requires_grad_(False)
    layer.mask = torch.rand(24, 64) < 0.5
    layer.backend = "fused"
    return layer, torch.randn(6, 64, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("amp", [False, True])
def test_layer_compiles_in_one_graph(backend, amp):
    layer, x = layer_and_input()
    inputs = x, layer.scores, layer.bias

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return layer(x).float().square().sum()

    eager = torch.autograd.grad(loss(x), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for ours, theirs in zip(torch.autograd.grad(compiled(x), inputs), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_exported_program_holds_no_cast_weight():
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.cached_cast_weight is not None
        program = torch.export.export(layer, (x,))
    assert not program.constants
    torch.testing.assert_close(program.module()(x), y)


def test_layer_keeps_no_effective_weight():
    layer, x = layer_and_input()
    layer.backend = "dense"
    dense = layer(x)
    assert layer.cached_effective_weight is not None
    layer.backend = "fused"
    torch.testing.assert_close(layer(x), dense)
    assert layer.cached_effective_weight is None and layer._cast is None


def test_layer_keeps_the_cast_weight_while_it_is_true():
    layer, x = layer_and_input()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = masked_linear(x, layer.weight, layer.scores, layer.mask, layer.bias, backend="dense")
        torch.testing.assert_close(y, wanted)
        return layer._cast

    kept = run()
    assert kept.dtype == torch.bfloat16 and kept is run()
    layer.mask = ~layer.mask
    assert kept is run()
    layer.weight.data.mul_(2)
    layer.weight.add_(1)
    changed = run()
    assert changed is not kept
    layer.load_state_dict(jk.MaskedLinear(64, 24).state_dict())
    assert run() is not changed
    layer(x)
    layer.double().float()
    assert layer._cast is None


def test_unfrozen_weight_learns_without_a_kept_copy():
    layer, x = layer_and_input()
    layer.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer._cast is None and layer.weight.grad.count_nonzero() <= layer.num_kept


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layer(reentrant):
    layer, x = layer_and_input()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.scores)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(layer.scores.grad, wanted, rtol=0, atol=0)


def test_distributed_data_parallel(tmp_path):
    layer, x = layer_and_input()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.scores)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        torch.nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(layer.scores.grad, wanted)


def test_context_manager_reaches_a_whole_model():
    layer, x = layer_and_input()
    layer.backend = "auto"
    with jk.use_backend("fused"):
        layer(x)
        assert layer.cached_effective_weight is None
    layer(x)
    assert layer.cached_effective_weight is not None


ERRORS = [
    ({"x": torch.ones(2, 8)}, ValueError, "x must have 9 elements in its last dimension, got shape [2, 8]"),
    ({"x": torch.ones(2, 9).half()}, TypeError, "x must be float32, got float16"),
    ({"x": torch.ones(2, 9, device="meta")}, ValueError, "x must be on cpu, got meta"),
    ({"bias": torch.ones(5).half()}, TypeError, "bias must be float32, got float16"),
    ({"mask": torch.ones(5, 9)}, TypeError, "mask must be a bool tensor, or int32 words, got float32"),
    ({"mask": torch.ones(2).long()}, TypeError, "mask must be a bool tensor, or int32 words, got int64"),
    ({"mask": torch.ones(3).int()}, ValueError, "mask as words must have shape [2], got [3]"),
    ({"mask": torch.ones(4).int()[::2]}, ValueError, "mask as words must be contiguous, got strides [2]"),
    ({"weight": torch.ones(5, 0)}, ValueError, "weight must have 2 dimensions, none of them empty"),
    (
        {"weight": torch.ones(5, 9).double(), "x": torch.ones(2, 9).double(), "bias": None},
        TypeError,
        'x must be float32, bfloat16 or float16 for backend="fused", got float64',
    ),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_come_before_any_launch(change, error, message, monkeypatch):
    for kernel in ("masked_matmul_kernel", "sum_splits_kernel", "weight_grads_kernel"):
        monkeypatch.setattr(kernels, kernel, None)
    tensors = {name: torch.ones(5, 9) for name in ("weight", "scores")}
    tensors |= {"x": torch.ones(2, 9), "mask": torch.ones(5, 9).bool(), "bias": torch.ones(5)}
    with pytest.raises(error) as caught:
        masked_linear(**tensors | change, backend="fused")
    assert str(caught.value).startswith(message)


ACCUMULATE_ERRORS = [
    ({"grad_scores": torch.ones(5, 9).half()}, TypeError, "grad_scores must be float32, got float16"),
    ({"grad_scores": torch.ones(9, 5)}, ValueError, "grad_scores must have shape [5, 9], got [9, 5]"),
    ({"grad_scores": torch.ones(9, 5).t()}, ValueError, "grad_scores must be contiguous, got strides [1, 5]"),
    ({"grad": torch.ones(3, 5)}, ValueError, "grad must have shape [2, 5], got [3, 5]"),
    ({"grad": torch.ones(2, 5).half()}, TypeError, "grad must be float32, got float16"),
    ({"grad": torch.ones(2, 5, device="meta")}, ValueError, "grad must be on cpu, got meta"),
    ({"x": torch.ones(2, 8)}, ValueError, "x must have 9 elements in its last dimension, got shape [2, 8]"),
    ({"x": None}, TypeError, "x must be a floating-point tensor, got NoneType"),
    ({"weight": torch.ones(5, 9).int()}, TypeError, "weight must be a floating-point tensor, got int32"),
    (
        {"weight": torch.ones(5, 9).double()},
        TypeError,
        'weight must be float32, bfloat16 or float16 for backend="fused", got float64',
    ),
]


@pytest.mark.parametrize(
    "change, error, message", ACCUMULATE_ERRORS, ids=[message for *_, message in ACCUMULATE_ERRORS]
)
def test_errors_of_accumulation_change_nothing(change, error, message):
    tensors = {name: torch.ones(5, 9) for name in ("grad_scores", "weight")}
    tensors |= {"grad": torch.ones(2, 5), "x": torch.ones(2, 9)} | change
    with pytest.raises(error) as caught:
        masked_linear_score_grad_(**tensors, backend="fused")
    assert str(caught.value) == message
    assert (tensors["grad_scores"] == 1).all()
