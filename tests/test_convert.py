"""convert and finalize: what is replaced, what stays, and that pre-trained weights keep their bits."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from jackpot_kernels.convert import convert, finalize, masked_layers, overlap, sparsity
from jackpot_kernels.layers import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear


class Network(nn.Module):
    """One layer of every kind, one of them in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU())
        self.shared = self.body[0]
        self.head = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))

    def forward(self, x):
        x = self.body(self.norm(self.conv(x)))
        return self.head(self.shared(x).mean((2, 3)))


def prune(model, share=0.5, seed=0):
    """Give every masked layer a random mask that keeps about `share`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape, generator=generator) < share
    return model


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("layer", "kind", "x"),
    [
        (nn.Linear(6, 4), MaskedLinear, torch.randn(2, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), MaskedConv1d, torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", bias=False), MaskedConv2d, torch.randn(2, 4, 7, 7)),
        (nn.Conv3d(2, 3, 2, dilation=2), MaskedConv3d, torch.randn(2, 2, 5, 5, 5)),
    ],
)
def test_a_single_layer_becomes_masked_and_plain_again(layer, kind, x):
    plain = copy.deepcopy(layer).eval()
    masked = convert(layer.eval())
    assert type(masked) is kind and list(masked_layers(masked)) == [""] and not masked.training
    torch.testing.assert_close(masked(x), plain(x))
    back = finalize(masked)
    assert type(back) is type(plain) and not back.training
    assert torch.equal(back(x), plain(x))


def test_layers_are_replaced_in_place_and_everything_is_frozen_but_scores():
    model = Network()
    keys, weights = list(model.state_dict()), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert convert(model) is model
    layers = masked_layers(model)
    assert list(layers) == ["conv", "body.0", "head.0", "head.1"]
    assert [type(layer) for layer in layers.values()] == [MaskedConv2d] * 2 + [MaskedLinear] * 2
    assert [k for k in model.state_dict() if k.split(".")[-1] not in ("scores", "mask_words")] == keys
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert {n for n, flag in flags(model).items() if flag} == {f"{name}.scores" for name in layers}
    assert sparsity(model) == (0, 0)


def test_a_layer_in_two_places_stays_one():
    model = convert(Network())
    assert model.shared is model.body[0]
    finalize(model)
    assert model.shared is model.body[0] and type(model.shared) is nn.Conv2d


def test_the_order_of_modules_does_not_change():
    plain, model = Network(), convert(Network())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_survive_the_round_trip(masked):
    x, plain, model = torch.randn(2, 3, 6, 6), Network().eval(), convert(Network().eval())
    if masked:
        prune(model)
        for name, layer in masked_layers(model).items():
            plain.get_submodule(name).weight.data.mul_(layer.mask)
    torch.testing.assert_close(model(x), plain(x))
    finalize(model)
    assert not masked_layers(model)
    assert torch.equal(model(x), plain(x))


def test_finalized_weights_are_positive_zero_where_pruned_and_keep_their_bits_elsewhere():
    model = convert(Network())
    masks = {name: layer.mask for name, layer in masked_layers(prune(model)).items()}
    before = {name: layer.weight.detach().clone() for name, layer in masked_layers(model).items()}
    finalize(model)
    for name, mask in masks.items():
        bits = model.get_submodule(name).weight.detach().view(torch.int32)
        assert torch.equal(bits[mask], before[name].view(torch.int32)[mask]) and not bits[~mask].any()


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("conv", ["body.0", "head.0", "head.1"]),
        (("head.1", "conv"), ["body.0", "head.0"]),
        (["head"], ["conv", "body.0"]),
        ("head.*", ["conv", "body.0"]),
        ("shared", ["conv", "head.0", "head.1"]),
        ("*.0", ["conv", "head.1"]),
    ],
)
def test_excluded_layers_stay_plain_but_are_frozen(exclude, left):
    model = convert(Network(), exclude)
    assert list(masked_layers(model)) == left
    assert {n for n, flag in flags(model).items() if flag} == {f"{name}.scores" for name in left}


def test_converting_again_changes_nothing():
    model = prune(convert(Network(), "conv"))
    layers, state = masked_layers(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.head[0].scores.requires_grad_(False)
    convert(model, "conv")
    assert masked_layers(model) == layers
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.head[0].scores.requires_grad and model.head[1].scores.requires_grad
    convert(model)
    assert list(masked_layers(model)) == ["conv", "body.0", "head.0", "head.1"]


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("nothing", ValueError, "exclude must name layers that can be masked, got 'nothing'"),
        (("conv", "norm"), ValueError, "exclude must name layers that can be masked, got 'norm'"),
        (
            ("conv", "body", "head"),
            ValueError,
            "model must hold an nn.Linear or nn.Conv1d/2d/3d to mask, got Network",
        ),
        ([3], TypeError, "exclude must hold names, got int"),
        (3, TypeError, "exclude must hold names, got int"),
    ],
)
def test_bad_excludes_are_refused_and_the_model_stays_as_it_was(exclude, error, message):
    model = Network()
    before = dict(model.named_modules()), flags(model)
    with pytest.raises(error) as raised:
        convert(model, exclude)
    assert str(raised.value) == message
    assert (dict(model.named_modules()), flags(model)) == before


def test_a_masked_layer_cannot_be_excluded():
    model = convert(Network())
    with pytest.raises(ValueError, match=r"exclude must name plain layers, but 'head' names 'head\.0'"):
        convert(model, "head")


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(), nn.Embedding(3, 3)]
)
def test_a_model_without_layers_is_refused(model):
    for function in (convert, finalize, sparsity, lambda m: overlap(m, m)):
        with pytest.raises(ValueError, match=r"^model must hold "):
            function(model)
    assert masked_layers(model) == {}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_that_a_hook_computes_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"^weight of '1' must be a parameter, but a hook computes it"):
        convert(model)
    assert type(model[0]) is nn.Linear and all(flags(model).values())


def test_a_forward_of_its_own_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].forward = lambda x: 2 * x
    with pytest.raises(
        ValueError, match="forward of '1' must be that of its class, got one of its own; excl"
    ):
        convert(model)
    assert type(model[0]) is nn.Linear
    assert type(convert(model, exclude="1")[0]) is MaskedLinear


def test_hooks_and_what_was_put_on_a_layer_go_along_both_ways():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    layer, inner = model[0], nn.Dropout().eval()
    hook = layer.register_forward_hook(lambda *_: 2 * _[2])
    layer.scale, layer.inner = 3.0, inner
    layer.register_buffer("counts", torch.ones(2))
    layer.register_buffer("passing", torch.ones(2), persistent=False)
    layer.extra = nn.Parameter(torch.ones(2))
    before, keys = model(x), model.state_dict().keys()
    convert(model)
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == keys | {"0.scores", "0.mask_words"}
    assert (model[0].scale, model[0].inner) == (3.0, inner) and not inner.training
    finalize(model)
    assert torch.equal(model(x), before) and model.state_dict().keys() == keys
    assert (model[0].scale, model[0].inner) == (3.0, inner) and not inner.training
    assert not vars(model[0]).keys() - vars(layer).keys()
    hook.remove()
    assert torch.equal(2 * model(x), before)


@pytest.mark.parametrize("function", [convert, finalize, masked_layers, sparsity])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        function(None)


def test_a_complex_weight_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^weight of '1' must be floating-point, got torch.complex64$"):
        convert(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_refused():
    with pytest.raises(ValueError, match=r"^weight of '1' must not be empty, got shape \[3, 0\]$"):
        convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(0, 3)))


def test_a_lazy_module_that_has_not_run_is_refused_and_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"'1\.weight' must have a shape, got a lazy one"):
        convert(model)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    model(torch.randn(1, 4))
    assert len(masked_layers(convert(model))) == 2


def test_a_sharded_model_is_refused(shard):
    plain, masked = shard(Network()), shard(convert(Network()))
    sharded = r"must be a plain tensor, got a DTensor \(sharded by FSDP or tensor parallelism\)$"
    with pytest.raises(TypeError, match=rf"^parameter 'conv\.weight' {sharded}"):
        convert(plain)
    with pytest.raises(TypeError, match=rf"^weight of 'conv' {sharded}"):
        finalize(masked)
    assert type(plain.conv) is nn.Conv2d and type(masked.conv) is MaskedConv2d


@pytest.mark.parametrize("name", ["weight", "bias", "scores"])
def test_what_a_parametrization_computes_is_not_finalized(name):
    model = convert(Network())
    nn.utils.parametrize.register_parametrization(model.head[1], name, nn.Identity())
    with pytest.raises(ValueError, match=rf"^{name} of 'head.1' must be a parameter, got one that a param"):
        finalize(model)
    assert len(masked_layers(model)) == 4


def test_subclasses_stay_plain():
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    model = convert(nn.Sequential(nn.Linear(3, 3), Own(3, 3), parametrized))
    assert list(masked_layers(model)) == ["0"] and type(model[1]) is Own and model[2] is parametrized


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def zero_pruned(model, masked):
    for name, layer in masked_layers(masked).items():
        model.get_submodule(name).weight.data.mul_(layer.mask)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_transformers_does_not_pass_by_the_masks(activation, padded):
    x, options = torch.randn(2, 5, 8), {}
    if padded:
        options["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain, model = encoder(activation=activation), convert(encoder(activation=activation))
    names = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert list(masked_layers(model)) == names
    assert type(model.layers[0].self_attn.out_proj) is type(plain.layers[0].self_attn.out_proj)
    zero_pruned(plain, prune(model, 0.2))
    with torch.no_grad():
        # Padded positions hold nothing that anybody reads.
        torch.testing.assert_close(model(x, **options)[:, :3], plain(x, **options)[:, :3])
        finalize(model)
        assert torch.equal(model(x, **options), plain(x, **options))


def test_a_weight_shared_with_an_embedding_is_masked_in_the_layer_only():
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = convert(nn.Sequential(embedding, head))
    before = embedding.weight.detach().clone()
    assert model[1].weight is embedding.weight
    prune(model)
    tokens = torch.arange(7)
    torch.testing.assert_close(model(tokens), before @ (before * model[1].mask).T)
    assert sparsity(model).overall == pytest.approx((28 - model[1].num_kept) / 56)
    finalize(model)
    assert torch.equal(embedding.weight, before) and torch.equal(
        model[1].weight != 0, model[1].weight == before
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_keep_their_bits(dtype):
    model = Network().to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    convert(model)
    assert all(layer.scores.dtype == torch.float32 for layer in masked_layers(model).values())
    finalize(model)
    assert all(p.dtype == dtype and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_channels_last_and_copies():
    model = prune(convert(Network().eval().to(memory_format=torch.channels_last)))
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    expected = model(x)
    finalize(model)
    assert list(masked_layers(other)) == ["conv", "body.0", "head.0", "head.1"]
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(other(x), expected)


def test_sparsity_of_one_layer_that_keeps_everything():
    assert sparsity(convert(nn.Linear(3, 2))) == (0.0, 0.0)


def test_sparsity_counts_a_plain_weight_in_two_places_once():
    model = convert(nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 6), nn.Embedding(4, 5)))
    model[2].weight = model[0].weight
    model[1].mask = torch.arange(30).view(6, 5) < 10
    assert sparsity(model).overall == pytest.approx(20 / (20 + 30))


def test_finalized_parameters_are_frozen_as_the_masked_ones_were():
    model = convert(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    model[1].bias.requires_grad_()
    finalize(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, True]


def test_the_fast_path_comes_back_after_converting_twice():
    model = encoder()
    first = [layer.activation_relu_or_gelu for layer in model.layers]
    finalize(convert(convert(model)))
    assert [layer.activation_relu_or_gelu for layer in model.layers] == first and any(first)


def test_sparsity_counts_every_weight_of_the_network():
    model = nn.Sequential(
        nn.Embedding(4, 5), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 2)
    )
    convert(model, "4")
    model[1].mask = torch.arange(30).view(6, 5) < 10
    # The last masked layer is whole: it counts among all weights only.
    assert sparsity(model) == (pytest.approx(20 / 30), pytest.approx(20 / (20 + 30 + 42 + 14)))
    model[3].mask = torch.arange(42).view(7, 6) != 0
    assert sparsity(model) == (pytest.approx(21 / 72), pytest.approx(21 / 106))


def test_overlap_is_the_share_of_weights_that_agree():
    rng = np.random.default_rng(0)
    a, b = ({n: rng.random(s) < 0.3 for n, s in (("x", (4, 5)), ("y", (3, 2, 2)))} for _ in range(2))
    expected = 1 - sum(np.abs(a[n].astype(int) - b[n].astype(int)).sum() for n in a) / 32
    masks_a, masks_b = ({n: torch.tensor(m) for n, m in masks.items()} for masks in (a, b))
    assert overlap(masks_a, masks_b) == pytest.approx(expected)
    assert overlap(masks_a, masks_a) == 1
    assert overlap(masks_a["x"], ~masks_a["x"]) == 0
    model = prune(convert(Network()))
    other = copy.deepcopy(model)
    mask = other.head[1].mask
    mask[0, 0] ^= True
    other.head[1].mask = mask
    total = sum(layer.weight.numel() for layer in masked_layers(model).values())
    assert overlap(model, other) == pytest.approx(1 - 1 / total)
    assert overlap(model, {name: layer.mask for name, layer in masked_layers(model).items()}) == 1


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (
            {"x": [2]},
            {"y": [2]},
            ValueError,
            "masks_a and masks_b must name the same layers, got ['x', 'y'] in one only",
        ),
        ({"x": [2]}, {"x": [3]}, ValueError, "masks of 'x' must have one shape, got (2,) and (3,)"),
        ({}, {}, ValueError, "masks_a and masks_b must hold at least one weight, got none"),
    ],
)
def test_overlap_refuses_masks_that_do_not_match(a, b, error, message):
    masks = [{n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()} for shapes in (a, b)]
    with pytest.raises(error) as raised:
        overlap(*masks)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(3), "mask of 'mask' must be bool, got float32"),
        ({"mask": [True]}, "mask of 'mask' must be a tensor, got list"),
        (5, "masks_a must be a mask, a dict of masks or a model, got int"),
    ],
)
def test_overlap_refuses_what_is_no_mask(wrong, message):
    with pytest.raises(TypeError) as raised:
        overlap(wrong, torch.ones(3, dtype=torch.bool))
    assert str(raised.value) == message
