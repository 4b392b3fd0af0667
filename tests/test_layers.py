import copy
import inspect
import pickle

import pytest
import torch
from closed_forms import assert_near, conv, double
from torch import nn
from torch.utils.checkpoint import checkpoint

from jackpot_kernels import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear, pack_mask

CONVS = {1: (nn.Conv1d, MaskedConv1d), 2: (nn.Conv2d, MaskedConv2d), 3: (nn.Conv3d, MaskedConv3d)}
PAIRS = [(nn.Linear, MaskedLinear), *CONVS.values()]
EVERY_OPTION = {
    "stride": 2,
    "padding": 1,
    "dilation": 2,
    "groups": 2,
    "bias": False,
    "padding_mode": "circular",
}
LAYERS = {
    "linear": (lambda: nn.Linear(13, 7), (5, 13)),
    "linear without bias": (lambda: nn.Linear(13, 7, bias=False), (2, 3, 13)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "every option": (lambda: nn.Conv2d(4, 6, (3, 2), **EVERY_OPTION), (2, 4, 9, 8)),
    "channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 7, 5)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1), (4, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=(0, 1, 1), padding_mode="replicate"), (2, 2, 3, 4, 5)),
}


def masked_of(plain):
    """Return the masked layer of a copy of ``plain``, with a random mask and random scores."""
    layer = dict(PAIRS)[type(plain)].from_dense(copy.deepcopy(plain))
    layer.mask = torch.rand(layer.weight.shape) < 0.4
    with torch.no_grad():
        layer.scores.copy_(torch.randn(layer.scores.shape))
    return layer


@pytest.fixture(params=LAYERS)
def case(request, seed):
    """A plain layer, its masked copy and an input."""
    make, shape = LAYERS[request.param]
    plain = make()
    return plain, masked_of(plain), torch.randn(shape)


@pytest.fixture
def layer(seed):
    return masked_of(nn.Conv2d(4, 6, 3))


@pytest.mark.parametrize("kind, masked", PAIRS)
def test_constructor_is_that_of_the_plain_layer(kind, masked):
    assert inspect.signature(masked) == inspect.signature(kind)
    arguments = (6, 4) if kind is nn.Linear else (6, 4, 3)
    plain, layer = kind(*arguments, dtype=torch.float16), masked(*arguments, dtype=torch.float16)
    assert list(layer.state_dict()) == [*plain.state_dict(), "scores", "mask_words"]
    assert layer.weight.dtype == torch.float16 and layer.weight.shape == plain.weight.shape
    assert layer.num_kept == layer.weight.numel() and layer.sparsity == 0
    assert layer.scores.dtype == torch.float32 and bool((layer.scores == 1).all())
    assert repr(layer) == f"Masked{repr(plain)[:-1]}, sparsity=0)"


def test_same_seed_same_weights():
    torch.manual_seed(3)
    plain = nn.Conv2d(3, 4, 5)
    torch.manual_seed(3)
    assert torch.equal(MaskedConv2d(3, 4, 5).weight, plain.weight)


def test_from_dense_shares_and_freezes(case):
    plain, _, x = case
    plain.eval().double()
    state = torch.get_rng_state()
    layer = dict(PAIRS)[type(plain)].from_dense(plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert not layer.training and layer.weight.dtype == torch.float64 and layer.scores.dtype == torch.float32
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["scores"]
    assert torch.equal(layer(x.double()), plain(x.double()))


def test_to_dense_computes_the_same_bits(case):
    plain, layer, x = case
    dense = layer.eval().to_dense()
    assert type(dense) is type(plain) and not dense.training
    assert (
        torch.equal(dense.weight, layer.weight * layer.mask)
        and dense.weight.stride() == layer.weight.stride()
    )
    assert not (dense.weight.signbit() & (dense.weight == 0)).any()
    assert all(p.requires_grad for p in dense.parameters())
    assert repr(dense) == repr(plain)
    assert torch.equal(dense(x), layer(x))
    before = layer(x)
    with torch.no_grad():
        dense.weight.zero_()
        dense.load_state_dict({name: tensor + 1 for name, tensor in dense.state_dict().items()})
    assert torch.equal(layer(x), before)


def test_gradients_equal_those_of_the_plain_layer(case):
    _, layer, x = case
    dense = layer.to_dense()
    x.requires_grad_()
    grad = torch.randn_like(layer(x))
    dx, dscores = torch.autograd.grad(layer(x), (x, layer.scores), grad)
    wanted_dx, g = torch.autograd.grad(dense(x), (x, dense.weight), grad)
    torch.testing.assert_close(dx, wanted_dx)
    torch.testing.assert_close(dscores, g * layer.weight)
    assert dscores.is_contiguous()


def test_unfrozen_weight_and_bias_learn_under_the_mask(case):
    _, layer, x = case
    layer.weight.requires_grad_()
    dense = layer.to_dense()
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * layer.mask)
    with torch.no_grad():
        layer.weight += 1
        dense.weight.copy_(layer.weight * layer.mask)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_padding_modes_match_closed_form(dims, mode, padding):
    layer = CONVS[dims][1](4, 6, 3, padding=padding, dilation=2, groups=2, padding_mode=mode)
    layer.mask = torch.rand(layer.weight.shape) < 0.5
    x = torch.randn(2, 4, *(6, 5, 4)[:dims], requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    inputs = x, layer.weight, layer.scores, layer.bias
    grads = torch.autograd.grad(y, inputs, grad)
    arrays = map(double, (x, layer.weight, layer.mask, layer.bias))
    truth = conv(*arrays, lambda _: double(grad), [1] * dims, [2] * dims, 2, [(2, 2)] * dims, mode)
    dense = layer.to_dense()
    their_y = dense(x)
    their_dx, g, db = torch.autograd.grad(their_y, (x, dense.weight, dense.bias), grad)
    theirs = their_y, their_dx, g * layer.mask, g * layer.weight, db
    for our, their, true in zip((y, *grads), theirs, truth, strict=True):
        assert_near(our, their, true, torch.float32)


def test_every_backend_agrees(case):
    _, layer, x = case
    results = []
    for backend in ("auto", "dense", "reference"):
        layer.backend = backend
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), layer.scores)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_mask(layer):
    wanted = torch.zeros(6, 4, 3, 3, dtype=torch.bool)
    wanted[1, 2] = wanted[5, 3, 2, 2] = True
    words = layer.mask_words
    layer.mask = wanted
    assert torch.equal(layer.mask, wanted) and layer.mask_words is words
    assert torch.equal(words, pack_mask(wanted))
    assert layer.num_kept == 10 and layer.sparsity == 1 - 10 / 216
    assert "sparsity=0.9537)" in repr(layer)
    layer.mask = wanted.to(memory_format=torch.channels_last)
    assert torch.equal(layer.mask, wanted) and layer.mask.is_contiguous()


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(6, 4, 3, 3), TypeError, "mask must be bool, got float32"),
        (torch.ones(6, 4, 9).bool(), ValueError, "mask must have shape [6, 4, 3, 3], got [6, 4, 9]"),
        (None, TypeError, "mask must be a tensor, got NoneType"),
    ],
)
def test_a_wrong_mask_changes_nothing(layer, mask, error, message):
    before = layer.mask
    with pytest.raises(error) as caught:
        layer.mask = mask
    assert str(caught.value) == message and torch.equal(layer.mask, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_errors(layer):
    with pytest.raises(TypeError, match=r"module must be an nn.Conv2d, got Linear"):
        MaskedConv2d.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"weight must have no empty dimension, got shape \[3, 0\]"):
        MaskedLinear(0, 3)
    with pytest.raises(ValueError, match="x must have 4 or 3 dimensions and 4 channels"):
        layer(torch.ones(1, 5, 6, 6))
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        layer(torch.ones(1, 4, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must have 2 elements in its last dimension, got shape \[3, 5\]"):
        masked_of(nn.Linear(2, 4))(torch.ones(3, 5))
    with pytest.raises(ValueError, match="x must be on cpu, got meta"):
        masked_of(nn.Linear(2, 4))(torch.ones(3, 2, device="meta"))
    layer.backend = "fast"
    with pytest.raises(
        ValueError, match="backend must be one of auto, fused, mixed, dense, reference, got 'fast'"
    ):
        layer(torch.ones(1, 4, 6, 6))


def assert_fresh(layer):
    """What the layer now computes with is its weight under its mask, and it is kept."""
    kept = layer.effective_weight()
    assert torch.equal(kept, layer.weight * layer.mask) and kept.stride() == layer.weight.stride()
    assert layer.effective_weight() is kept is layer.cached_effective_weight


def test_effective_weight_follows_weight_and_mask(layer):
    assert layer.cached_effective_weight is None
    assert_fresh(layer)
    layer.mask = ~layer.mask
    assert layer.cached_effective_weight is None
    assert_fresh(layer)
    layer.mask_words.bitwise_not_()
    assert layer.cached_effective_weight is None
    assert_fresh(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_fresh(layer)
    layer.weight.data = torch.randn(6, 4, 3, 3)
    assert_fresh(layer)
    layer.weight = nn.Parameter(torch.randn(6, 4, 3, 3), requires_grad=False)
    assert_fresh(layer)
    layer.load_state_dict(masked_of(nn.Conv2d(4, 6, 3)).state_dict())
    assert_fresh(layer)
    layer.double().to(memory_format=torch.channels_last)
    assert_fresh(layer)
    assert layer.effective_weight().dtype == torch.float64


def test_effective_weight_is_built_once(layer, monkeypatch):
    x = torch.randn(1, 4, 5, 5)
    layer(x)
    kept = layer.cached_effective_weight
    monkeypatch.setattr("jackpot_kernels.layers.effective_weight", None)
    monkeypatch.setattr("jackpot_kernels.ops.masked.effective_weight", None)
    layer(x).sum().backward()
    layer.scores.data.add_(1)
    layer(x).sum().backward()
    assert layer.cached_effective_weight is kept


def test_patched_effective_weight_is_kept(layer):
    """What the optimizer does: it writes to the words and to the effective weight, once each."""
    layer.effective_weight()
    for step in range(3):
        cached = layer.cached_effective_weight
        mask = torch.rand(6, 4, 3, 3) < 0.5
        layer.mask_words.copy_(pack_mask(mask))
        with torch.no_grad():
            cached.copy_(layer.weight * mask)
        assert layer.cached_effective_weight is cached, step
        assert_fresh(layer)


def test_patching_a_stale_effective_weight_does_not_make_it_fresh(layer):
    made = layer.effective_weight()
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.autograd.graph.increment_version((layer.mask_words, made))
    assert layer.cached_effective_weight is None
    assert_fresh(layer)


def test_a_write_to_the_mask_alone_is_noticed_after_a_patch(layer):
    made = layer.effective_weight()
    torch.autograd.graph.increment_version((layer.mask_words, made))
    assert layer.cached_effective_weight is made
    layer.mask_words.zero_()
    assert layer.cached_effective_weight is None
    assert_fresh(layer)


def test_a_new_weight_in_old_memory_is_noticed(layer):
    with torch.no_grad():
        old = layer.weight.mul_(1)
    layer.effective_weight()
    new = nn.Parameter(old.data, requires_grad=False)
    while new._version < old._version:
        new.mul_(2)
    layer.weight = new
    assert_fresh(layer)


def test_score_gradient_is_not_copied(layer):
    """The gradient that the kernel made becomes ``scores.grad``, with no second buffer."""
    made = []
    layer.scores.register_hook(lambda grad: made.append(grad.data_ptr()))
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert made == [layer.scores.grad.data_ptr()]


def test_patching_between_forward_and_backward_is_caught(layer):
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = layer(x)
    layer.cached_effective_weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_unfrozen_weight_is_not_cached(layer):
    layer.weight.requires_grad_()
    layer(torch.randn(1, 4, 5, 5))
    assert layer.cached_effective_weight is None


def test_inference_mode_leaves_no_inference_tensor(layer):
    x = torch.randn(1, 4, 5, 5)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    layer.cached_effective_weight.mul_(1)


def test_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer = masked_of(nn.Linear(3, 4))
        x = torch.randn(2, 3)
        assert torch.equal(layer(x), layer.to_dense()(x))


def test_autocast_keeps_one_effective_weight_in_its_dtype(layer):
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        kept = layer.cached_effective_weight
        wanted = layer.to_dense()(x)
        assert layer(x) is not None and layer.cached_effective_weight is kept
    assert y.dtype == kept.dtype == torch.bfloat16 and torch.equal(y, wanted)
    y.sum().backward()
    assert x.grad.dtype == layer.scores.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32
    assert_fresh(layer)


MOVES = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.float16),
    "channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "half and channels_last": lambda layer: layer.to(torch.float16, memory_format=torch.channels_last),
    "device": lambda layer: layer.to("cpu"),
    "share": lambda layer: layer.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("move", MOVES)
def test_scores_and_mask_stay_exact(move, kernel):
    layer = masked_of(nn.Conv2d(4, 6, kernel))
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    scores, grad, mask, weight = (
        layer.scores,
        layer.scores.grad.clone(),
        layer.mask,
        layer.weight.detach().clone(),
    )
    values, strides = scores.detach().clone(), scores.stride()
    moved = MOVES[move](layer)
    assert (moved.scores is scores) == (moved is layer)
    assert moved.scores.dtype == torch.float32 and moved.mask_words.dtype == torch.int32
    assert moved.scores.stride() == strides
    assert torch.equal(moved.scores, values) and torch.equal(moved.mask, mask)
    assert torch.equal(moved.weight, weight.to(moved.weight.dtype))
    assert moved.scores.requires_grad and not moved.weight.requires_grad
    if move not in ("deepcopy", "pickle"):
        assert moved.scores.grad.dtype == torch.float32 and torch.equal(moved.scores.grad, grad)
    assert_fresh(moved)
    moved(torch.randn(1, 4, 5, 5).to(moved.weight.dtype)).sum().backward()


@pytest.mark.parametrize(
    "flag", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"]
)
def test_other_ways_of_converting(layer, flag):
    setter = getattr(torch.__future__, f"set_{flag}")
    values, mask = layer.scores.detach().clone(), layer.mask
    setter(True)
    try:
        layer.to(torch.float16, memory_format=torch.channels_last)
    finally:
        setter(False)
    assert layer.weight.dtype == torch.float16 and layer.scores.dtype == torch.float32
    assert (
        layer.scores.is_contiguous() and torch.equal(layer.scores, values) and torch.equal(layer.mask, mask)
    )


def test_optimizer_made_before_a_move_still_holds_the_scores(layer):
    optimizer = torch.optim.SGD([layer.scores], lr=0.5)
    layer.half().to("cpu")
    layer.scores.grad = torch.ones_like(layer.scores)
    before = layer.scores.detach().clone()
    optimizer.step()
    assert torch.equal(layer.scores, before - 0.5)


def test_meta_device_then_memory():
    layer = MaskedLinear(5, 3, device="meta")
    assert layer.scores.is_meta and layer.mask_words.is_meta and "sparsity" not in repr(layer)
    assert layer(torch.ones(2, 5, device="meta")).shape == (2, 3)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.num_kept == 15 and bool((layer.scores == 1).all()) and layer.scores.dtype == torch.float32


def test_state_dict_round_trip(case):
    plain, layer, x = case
    layer.effective_weight()
    state = copy.deepcopy(layer.state_dict())
    assert list(state) == [*plain.state_dict(), "scores", "mask_words"]
    other = type(layer).from_dense(plain)
    other(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.scores, layer.scores)


def test_loads_the_state_of_a_plain_layer(case):
    plain, layer, x = case
    mask, scores = layer.mask, layer.scores.detach().clone()
    layer(x)
    state = {name: tensor * 2 for name, tensor in plain.state_dict().items()}
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert missing == ["scores", "mask_words"] and not unexpected
    assert torch.equal(layer.mask, mask) and torch.equal(layer.scores, scores)
    assert torch.equal(layer.weight, plain.weight * 2) and torch.equal(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_scores_float32_and_contiguous(layer, assign):
    state = masked_of(nn.Conv2d(4, 6, 3)).state_dict()
    state["scores"] = state["scores"].double().to(memory_format=torch.channels_last)
    state["weight"] = state["weight"].half()
    layer(torch.randn(1, 4, 5, 5))
    layer.load_state_dict(state, assign=assign)
    assert layer.scores.dtype == torch.float32 and layer.scores.stride() == (36, 9, 3, 1)
    assert torch.equal(layer.scores, state["scores"].float()) and layer.scores.requires_grad
    assert layer.weight.dtype == (torch.float16 if assign else torch.float32)
    assert_fresh(layer)


def test_loading_refuses_a_mask_that_does_not_fit(layer):
    mask = layer.mask
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for mask_words"):
        layer.load_state_dict(state | {"mask_words": torch.zeros(3, dtype=torch.int32)})
    with pytest.raises(RuntimeError, match="mask_words must be int32, got float16"):
        layer.load_state_dict(state | {"mask_words": state["mask_words"].half()})
    assert torch.equal(layer.mask, mask) and layer.mask_words.dtype == torch.int32


def test_copies_carry_no_effective_weight(layer):
    layer(torch.randn(1, 4, 5, 5))
    size = len(pickle.dumps(layer))
    assert layer.cached_effective_weight is not None
    copied = copy.deepcopy(layer)
    assert copied.cached_effective_weight is None and len(pickle.dumps(copied)) == size
    copied.mask = ~copied.mask
    assert_fresh(layer)
    assert_fresh(copied)


def test_gradients_accumulate_and_half_weights_give_float32():
    layer = masked_of(nn.Linear(5, 3)).bfloat16()
    x = torch.randn(4, 5).bfloat16()
    layer(x).sum().backward()
    once = layer.scores.grad.clone()
    layer(x).sum().backward()
    assert once.dtype == torch.float32 and torch.equal(layer.scores.grad, 2 * once)


def test_activation_checkpointing(layer):
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.scores))
    y = checkpoint(layer, x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), (x, layer.scores)), wanted))


def test_functional_call(layer):
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    layer(x)
    y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(y, nn.functional.conv2d(x, weight * layer.mask, layer.bias))
    assert torch.equal(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("warm", [True, False])
def test_compiles_in_one_graph_and_follows_patches(warm):
    convolution = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(masked_of(convolution), nn.ReLU(), masked_of(nn.Conv2d(6, 3, 3)))
    x = torch.randn(2, 4, 6, 6)
    if warm:
        model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        grads = torch.autograd.grad(compiled(x).square().sum(), [layer.scores for layer in model[::2]])
        assert all((layer.cached_effective_weight is not None) == warm for layer in model[::2])
        other = copy.deepcopy(model)
        wanted = torch.autograd.grad(other(x).square().sum(), [layer.scores for layer in other[::2]])
        torch.testing.assert_close(grads, wanted)
        for layer in model[::2]:
            mask = torch.rand(layer.weight.shape) < 0.5
            layer.mask_words.copy_(pack_mask(mask))
            if warm:
                layer._effective.copy_(layer.weight * mask)


def test_a_compiled_layer_follows_a_mask_that_is_assigned_or_loaded():
    layer, other, x = masked_of(nn.Linear(6, 5)), masked_of(nn.Linear(6, 5)), torch.randn(4, 6)
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.mask = torch.arange(30).view(5, 6) % 3 == 0
    torch.testing.assert_close(compiled(x), layer.to_dense()(x))
    other.mask = torch.arange(30).view(5, 6) % 3 == 1
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other.to_dense()(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_more_than_the_state_of_the_layer(strict):
    layer, other, x = masked_of(nn.Linear(6, 5)), masked_of(nn.Linear(6, 5)), torch.randn(4, 6)
    layer(x)
    program = torch.export.export(layer, (x,), strict=strict)
    assert not program.constants and program.state_dict.keys() == layer.state_dict().keys()
    exported = program.module()
    torch.testing.assert_close(exported(x), layer(x))
    exported.load_state_dict(other.state_dict())
    torch.testing.assert_close(exported(x), other(x))


def test_compiled_layer_trained_by_hand_forgets_what_it_kept():
    """Frozen again, a layer has new weights; nothing outside the graph has seen them change."""
    layer = MaskedLinear.from_dense(nn.Linear(8, 4))
    layer.mask = torch.rand(4, 8) < 0.5
    x = torch.randn(3, 8)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.weight.requires_grad_(True)
    for _ in range(2):
        compiled(x).square().sum().backward()
        with torch.no_grad():
            layer.weight -= layer.weight.grad
    layer.weight.requires_grad_(False)
    wanted = nn.functional.linear(x, layer.weight * layer.mask, layer.bias)
    torch.testing.assert_close(compiled(x), wanted)


def test_compiles_under_autocast():
    model = nn.Sequential(masked_of(nn.Linear(5, 7)), nn.ReLU(), masked_of(nn.Linear(7, 3)))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        torch._dynamo.reset()
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)


def test_mask_words_with_bits_after_the_last_weight_are_refused():
    layer = MaskedLinear(33, 1)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["mask_words"][-1] |= -2
    with pytest.raises(RuntimeError, match="mask_words must have no bits after the last weight, got some"):
        layer.load_state_dict(state)
    assert layer.num_kept == 33


def test_a_weight_that_was_trained_leaves_no_effective_weight_behind():
    """A compiled layer takes a kept one as it is."""
    layer = MaskedLinear(9, 5)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 9)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer._cast_weight()
    layer.weight.requires_grad_(True)
    layer(x).square().sum().backward()
    torch.optim.SGD([layer.weight], 0.1).step()
    layer.weight.requires_grad_(False)
    assert layer._cast is None
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", ["weight", "scores"])
def test_what_a_parametrization_computes_is_refused(layer, name):
    nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())
    with pytest.raises(RuntimeError, match=f"^{name} must be a parameter, got one that a param"):
        layer(torch.randn(1, 4, 5, 5))


def test_a_device_is_no_dtype(layer):
    with pytest.raises(TypeError, match=r"^dtype must be a torch\.dtype, got str$"):
        layer.effective_weight("cpu")
    assert layer.cached_effective_weight is None


def test_a_mask_on_meta_has_no_count(layer):
    with pytest.raises(ValueError, match=r"^mask must hold values, got a tensor on meta; load a state or "):
        _ = layer.to("meta").sparsity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_batches(dtype):
    layer = MaskedConv2d.from_dense(nn.Conv2d(4, 6, 3)).to(dtype=dtype, memory_format=torch.channels_last)
    y = layer(torch.randn(2, 4, 5, 5, dtype=dtype))
    along = torch.randn(3, *y.shape).to(dtype)
    (got,) = torch.autograd.grad(y, layer.scores, along, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(y, layer.scores, one, retain_graph=True)[0] for one in along]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=2**-6, atol=2**-6)


def test_gradients_of_each_sample_through_vmap(layer):
    x = torch.randn(3, 4, 5, 5)
    layer(x)

    def loss(scores, sample):
        return torch.func.functional_call(layer, {"scores": scores}, (sample,)).square().sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.scores, x)
    wanted = [torch.autograd.grad(layer(sample).square().sum(), layer.scores)[0] for sample in x]
    torch.testing.assert_close(grads, torch.stack(wanted))
    assert torch.equal(layer(x), layer.to_dense()(x))
