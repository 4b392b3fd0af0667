"""Jackpot files: the same outputs bit for bit, small, and nothing hostile, foreign or damaged gets in."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from jackpot_kernels.convert import convert, finalize, masked_layers, sparsity
from jackpot_kernels.files import JackpotFileError, load_jackpot, save_jackpot
from jackpot_kernels.initialize import initialize


class Network(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.again = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.alias = self.again
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.alias(self.again(self.norm(self.conv(x)))).relu()
        return self.head(x.mean((2, 3)))


def network(seed=0, dtype=torch.float32, width=16):
    torch.manual_seed(seed)
    model = Network(width).to(dtype).eval()
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.fill_(seed + 7)
    return model


def pruned(seed=0, dtype=torch.float32, share=0.9, width=16, **options):
    model = convert(network(seed, dtype, width))
    initialize(model, share, budget="uniform", **options)
    return model


def images(dtype=torch.float32):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def bits(model):
    return {name: value.numpy(force=True).tobytes() for name, value in model.float().state_dict().items()}


def unpack(path):
    """Header of the safetensors file, its jackpot entry and the payload, without the library."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    return header, json.loads(header["__metadata__"]["jackpot"]), content[end:]


def repack(path, header, jackpot, payload):
    header = {
        **header,
        "__metadata__": {"jackpot": jackpot if isinstance(jackpot, str) else json.dumps(jackpot)},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def assert_refused(path, model, message=None):
    """The file is refused in one sentence, and the model keeps every bit."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(JackpotFileError, match=message) as raised:
        load_jackpot(path, model)
    assert "\n" not in str(raised.value) and isinstance(raised.value, ValueError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jackpot.safetensors"


@pytest.fixture
def saved(path):
    save_jackpot(pruned(), path, source="a test")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("final", [False, True])
def test_a_fresh_plain_model_computes_the_same_bits(path, dtype, final):
    model = pruned(dtype=dtype)
    if final:
        finalize(model)
    save_jackpot(model, path)
    fresh = network(seed=1, dtype=dtype)
    load_jackpot(path, fresh)
    finalized = model if final else finalize(model)
    assert torch.equal(fresh(images(dtype)), finalized(images(dtype)))
    assert bits(fresh) == bits(finalized)


def test_what_torch_compile_wraps_keeps_its_names(path, tmp_path):
    """In either direction, for the whole model and for a part of it."""
    model, fresh, other = pruned(), network(1), tmp_path / "other"
    save_jackpot(model, path)
    wanted = path.read_bytes()
    save_jackpot(torch.compile(model, backend="eager"), other)
    assert other.read_bytes() == wanted
    model.alias = model.again = torch.compile(model.again, backend="eager")
    fresh.alias = fresh.again = torch.compile(fresh.again, backend="eager")
    save_jackpot(model, other)
    assert other.read_bytes() == wanted
    load_jackpot(path, torch.compile(fresh, backend="eager"))
    assert torch.equal(fresh(images()), finalize(pruned()).eval()(images()))


def test_masked_and_finalized_models_make_the_same_tensors(tmp_path):
    model = pruned()
    save_jackpot(model, tmp_path / "masked")
    save_jackpot(finalize(model), tmp_path / "final")
    one, other = (safetensors.torch.load_file(tmp_path / name) for name in ("masked", "final"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_file_holds_bits_and_kept_values_and_no_scores(saved):
    model, tensors = pruned(), safetensors.torch.load_file(saved)
    assert set(tensors) == {
        *("conv.weight#mask", "conv.weight#values", "again.weight#mask", "again.weight#values", "again.bias"),
        *("embedding.weight", "head.weight", "head.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }
    for name in ("conv", "again"):
        layer = model.get_submodule(name)
        mask = layer.mask.numpy().ravel()
        words = tensors[f"{name}.weight#mask"].numpy()
        stored = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        np.testing.assert_array_equal(stored[: mask.size], mask)
        assert not stored[mask.size :].any() and words.size == -(-mask.size // 32)
        np.testing.assert_array_equal(
            tensors[f"{name}.weight#values"].numpy(), layer.weight.detach().numpy().ravel()[mask]
        )


def test_the_header_records_layers_sparsity_and_source(saved):
    model = pruned()
    jackpot = unpack(saved)[1]
    assert jackpot["version"] == 1 and jackpot["source"] == "a test"
    kept = {f"{n}.weight": masked_layers(model)[n].num_kept for n in ("conv", "again")}
    assert {n: layer["num_kept"] for n, layer in jackpot["layers"].items()} == kept
    assert jackpot["layers"]["again.weight"]["shape"] == [16, 8, 3, 3]
    assert jackpot["layers"]["conv.weight"]["dtype"] == "float32"
    info = load_jackpot(saved, network(seed=1))
    assert info.source == "a test" and info.sparsity == sparsity(model)
    save_jackpot(finalize(model), saved)
    assert load_jackpot(saved, network(seed=1)).sparsity == pytest.approx(info.sparsity)


def test_at_90_percent_the_file_is_at_most_14_percent_of_the_dense_one(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 600), nn.ReLU(), nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 10))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "dense")
    initialize(convert(model), 0.9, keep_last_dense=False)
    save_jackpot(model, tmp_path / "jackpot")
    assert (tmp_path / "jackpot").stat().st_size <= 0.14 * (tmp_path / "dense").stat().st_size


def test_the_same_network_makes_the_same_file(tmp_path):
    for name in ("one", "other"):
        save_jackpot(pruned(), tmp_path / name, source="s")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_kept_zeros_negative_zeros_and_nan_keep_their_bits(path):
    model = pruned(share=0.5)
    mask = model.again.mask
    kept = mask.flatten().nonzero()[:4, 0]
    model.again.weight.data.view(-1)[kept] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    model.again.weight.data.view(-1)[~mask.flatten()] = -1.0
    save_jackpot(model, path)
    fresh = network(1)
    load_jackpot(path, fresh)
    assert bits(fresh) == bits(finalize(model))


def test_memory_format_dtype_and_identity_of_the_fresh_model_stay(saved):
    fresh = network(1).to(memory_format=torch.channels_last)
    parameters = dict(fresh.named_parameters())
    load_jackpot(saved, fresh)
    assert all(p is parameters[n] for n, p in fresh.named_parameters())
    assert fresh.again.weight.is_contiguous(memory_format=torch.channels_last)
    assert bits(fresh) == bits(finalize(pruned()))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: m.to(memory_format=torch.channels_last)])
def test_copies_and_memory_formats_make_the_same_file(saved, tmp_path, through):
    save_jackpot(through(pruned()), tmp_path / "other", source="a test")
    assert (tmp_path / "other").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("share", [0, 0.02])
def test_layers_that_are_not_worth_packing_are_stored_as_they_are(path, share):
    model = pruned(share=share)
    save_jackpot(model, path)
    assert not any("#" in name for name in safetensors.torch.load_file(path))
    fresh = network(1)
    load_jackpot(path, fresh)
    assert bits(fresh) == bits(finalize(model))


def test_a_single_layer(path):
    model = convert(nn.Linear(40, 3))
    initialize(model, 0.9, keep_last_dense=False)
    save_jackpot(model, path)
    fresh = nn.Linear(40, 3)
    load_jackpot(path, fresh)
    assert bits(fresh) == bits(finalize(model))


def tied(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 50, bias=False))
    model[1].weight = model[0].weight
    return model


def test_shared_tensors_are_stored_once(path):
    save_jackpot(tied(0), path)
    assert list(safetensors.torch.load_file(path)) == ["0.weight"]
    for fresh in (tied(1), nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 50, bias=False))):
        load_jackpot(path, fresh)
        assert bits(fresh) == bits(tied(0))


def test_views_of_one_storage_are_stored_each(path):
    model, fresh = nn.Linear(4, 4), nn.Linear(4, 4)
    block = torch.randn(5, 4)
    model.weight, model.bias = nn.Parameter(block[:4]), nn.Parameter(block[0])
    save_jackpot(model, path)
    load_jackpot(path, fresh)
    assert torch.equal(fresh.weight, block[:4]) and torch.equal(fresh.bias, block[0])


def test_modules_part_where_one_of_them_was_pruned(path):
    model = convert(tied(0))
    initialize(model, 0.9, keep_last_dense=False)
    save_jackpot(model, path)
    fresh = tied(1).requires_grad_(False)
    optimized = dict(fresh.named_parameters())
    for other in (nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 50, bias=False)), fresh):
        load_jackpot(path, other)
        assert bits(other) == bits(finalize(copy.deepcopy(model)))
    assert fresh[0].weight is optimized["0.weight"] and not fresh[1].weight.requires_grad


def test_two_contents_for_one_tensor_are_refused(path):
    class Doubled(nn.Module):
        def __init__(self, apart):
            super().__init__()
            self.a = nn.BatchNorm1d(4)
            self.b = nn.BatchNorm1d(4) if apart else self.a

    save_jackpot(Doubled(apart=True), path)
    shared = Doubled(apart=False)
    load_jackpot(path, shared)
    apart = Doubled(apart=True)
    apart.b.weight.data += 1
    save_jackpot(apart, path)
    assert_refused(path, shared, "^'a.weight' and 'b.weight' must be equal, being one tensor in the model")
    buffers = Doubled(apart=True)
    buffers.b.running_mean = buffers.a.running_mean
    apart.b.weight.data -= 1
    apart.b.running_mean += 1
    save_jackpot(apart, path)
    assert_refused(path, buffers, "^'a.running_mean' and 'b.running_mean' must be equal, being one tensor")


def test_empty_tensors_and_frozen_parameters(path):
    def make():
        return nn.Sequential(nn.Linear(0, 3), nn.Linear(0, 4)).requires_grad_(False)

    with pytest.warns(UserWarning, match="Initializing zero-element tensors"):
        model, fresh = make(), make()
    save_jackpot(model, path)
    load_jackpot(path, fresh)
    assert bits(fresh) == bits(model) and not any(p.requires_grad for p in fresh.parameters())


# What is refused.


def test_a_file_cut_anywhere_is_refused(saved, tmp_path):
    content, model = saved.read_bytes(), network(1)
    cut = tmp_path / "cut"
    header = 8 + struct.unpack("<Q", content[:8])[0]
    ends = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1, *range(10, len(content), 331)}
    for end in sorted(ends):
        cut.write_bytes(content[:end])
        assert_refused(cut, model, "^path must be a complete safetensors file, got ")
    cut.write_bytes(content + b"\0")
    assert_refused(cut, model)


def test_random_damage_never_half_loads(saved, tmp_path):
    content, damaged = saved.read_bytes(), tmp_path / "damaged"
    rng = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for position in rng.integers(0, header, 150):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.integers(8)
        damaged.write_bytes(changed)
        model = network(1)
        before = bits(model)
        try:
            load_jackpot(damaged, model)
        except JackpotFileError:
            assert bits(model) == before


def test_a_flipped_bit_of_any_tensor_is_refused(saved, tmp_path):
    content, damaged = saved.read_bytes(), tmp_path / "damaged"
    rng = np.random.default_rng(1)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for position in rng.integers(header, len(content), 100):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.integers(8)
        damaged.write_bytes(changed)
        assert_refused(damaged, network(1))


def test_a_file_from_before_there_was_a_digest_is_read(saved, tmp_path):
    _, header, _ = unpack(saved)
    del header["sha256"]
    old = tmp_path / "old"
    old.write_bytes(
        safetensors.torch.save(safetensors.torch.load_file(saved), {"jackpot": json.dumps(header)})
    )
    model = network(1)
    load_jackpot(old, model)
    assert bits(model) == bits(finalize(pruned()))


def test_the_default_device_is_not_asked(saved):
    model = network(1)
    with torch.device("meta"):
        load_jackpot(saved, model)
    assert bits(model) == bits(finalize(pruned()))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 10**9, 0, 3])
def test_a_lying_header_length_is_refused(saved, length):
    saved.write_bytes(struct.pack("<Q", length) + saved.read_bytes()[8:])
    assert_refused(saved, network(1))


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_torch(path):
    torch.save({"conv.weight": torch.ones(3), "bomb": Bomb()}, path)


def write_plain_safetensors(path):
    safetensors.torch.save_file({"conv.weight": torch.ones(16, 3, 3, 3)}, path)


def write_empty(path):
    path.write_bytes(b"")


def write_no_tensors(path):
    safetensors.torch.save_file({}, path)


@pytest.mark.parametrize(
    "write", [write_pickle, write_torch, write_plain_safetensors, write_empty, write_no_tensors]
)
def test_foreign_files_are_refused_and_never_unpickled(path, write):
    write(path)
    assert_refused(path, network(1))


def test_an_oversized_file_is_refused_without_reading_it(path):
    with open(path, "wb") as file:
        text = json.dumps(
            {"a": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}
        ).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * 10**10)
    assert_refused(path, network(1), r"^path must hold at most \d+ bytes for this model, got 40000000089 in ")


def test_a_missing_file_and_a_folder_are_told_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_jackpot(tmp_path / "none", network(1))
    with pytest.raises(IsADirectoryError):
        load_jackpot(tmp_path, network(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: "{", "without its header"),
        (lambda j: "[" * 100_000, "without its header"),
        (lambda j: "[1]", "without its header"),
        (lambda j: "null", "without its header"),
        (lambda j: "9" * 10_000, "without its header"),
        (lambda j: j | {"version": 2}, r"version of .* must be 1, got 2"),
        (lambda j: j | {"version": [1]}, "version"),
        (lambda j: j | {"layers": []}, "'layers' must be a table, got list"),
        (lambda j: j | {"layers": {}}, "tensors of the file must match"),
        (
            lambda j: j | {"layers": j["layers"] | {"other": {}}},
            r"'layers' of the file must match .*none missing and 'other' unknown",
        ),
        (lambda j: j | {"layers": j["layers"] | {"conv.weight": 3}}, "header of 'conv.weight' must be"),
        (lambda j: j | {"aliases": None}, "'aliases' must be a table, got NoneType"),
        (lambda j: j | {"aliases": {}}, "tensors of the file must match .*'alias.weight'"),
        (
            lambda j: j | {"aliases": j["aliases"] | {"x": "conv.weight"}},
            r"'aliases' of the file must match .*none missing and 'x' unknown",
        ),
        (
            lambda j: j | {"aliases": j["aliases"] | {"head.bias": "head.weight"}},
            "tensors of the file must match",
        ),
        (
            lambda j: j | {"aliases": j["aliases"] | {"alias.bias": ["again.bias"]}},
            "tensors of the file must match",
        ),
        (lambda j: j | {"sparsity": {"masked": 0.9}}, "'sparsity' must hold fractions"),
        (
            lambda j: j | {"sparsity": {"masked": float("nan"), "overall": 0}},
            "'sparsity' must hold fractions",
        ),
        (lambda j: j | {"sparsity": {"masked": 1.5, "overall": 0.5}}, "'sparsity' must hold fractions"),
        (lambda j: j | {"sparsity": None}, "'sparsity' must be a table"),
        (lambda j: j | {"source": 5}, "'source' must be a string, got int"),
    ],
)
def test_a_malformed_header_is_refused(saved, change, message):
    header, jackpot, payload = unpack(saved)
    repack(saved, header, change(jackpot), payload)
    assert_refused(saved, network(1), message)


def layer_entry(field, value):
    return lambda j: j["layers"]["again.weight"].__setitem__(field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [8, 16, 3, 3]), ("shape", None), ("dtype", "float64"), ("num_kept", 117), ("num_kept", -1)],
)
def test_a_header_that_contradicts_tensors_or_model_is_refused(saved, field, value):
    header, jackpot, payload = unpack(saved)
    layer_entry(field, value)(jackpot)
    repack(saved, header, jackpot, payload)
    assert_refused(saved, network(1), "^header of 'again.weight' must be ")


def forge(path, change):
    """Write the file anew with its tensors changed."""
    jackpot, tensors = unpack(path)[1], safetensors.torch.load_file(path)
    change(tensors, jackpot)
    safetensors.torch.save_file(tensors, path, {"jackpot": json.dumps(jackpot)})


def one_bit_more(tensors, jackpot):
    words = tensors["conv.weight#mask"]
    words[0] = words[0] ^ 1


def padding_bit(tensors, jackpot):
    words = tensors["conv.weight#mask"]  # 432 weights fill 13 and a half words
    words[13] |= 1 << 20


def moved_value(tensors, jackpot):
    tensors["conv.weight#values"] = tensors["conv.weight#values"][:-1].clone()
    jackpot["layers"]["conv.weight"]["num_kept"] -= 1


def swap_in(name, make):
    return lambda tensors, jackpot: tensors.__setitem__(name, make(tensors[name]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_bit_more, r"^mask of 'conv.weight' must keep \d+ weights as the header says, got \d+$"),
        (padding_bit, "^mask of 'conv.weight' must have no bits after weight 432, got some$"),
        (moved_value, "^mask of 'conv.weight' must keep 42 weights as the header says, got 43$"),
        (swap_in("conv.weight#mask", lambda t: t.long()), "^mask of 'conv.weight' must be int32"),
        (swap_in("conv.weight#mask", lambda t: t[:-1].clone()), "^mask of 'conv.weight' must be int32"),
        (swap_in("conv.weight#mask", lambda t: t.view(2, 7)), "^mask of 'conv.weight' must be int32"),
        (swap_in("conv.weight#values", lambda t: t.half()), "^values of 'conv.weight' must be float32"),
        (swap_in("conv.weight#values", lambda t: t.view(1, -1)), "^values of 'conv.weight' must be float32"),
        (swap_in("conv.weight#values", lambda t: t[:0].clone()), "^header of 'conv.weight' must be"),
        (
            swap_in("head.bias", lambda t: t.double()),
            "^'head.bias' must be float32 .5. as in the model, got float64",
        ),
        (
            swap_in("head.bias", lambda t: t.view(1, 5)),
            "^'head.bias' must be float32 .5. as in the model, got float32",
        ),
        (
            swap_in("head.weight", lambda t: t.T.contiguous()),
            "^'head.weight' must be float32 .5, 16. as in the model",
        ),
        (lambda t, j: t.pop("head.bias"), "got 'head.bias' missing and none unknown$"),
        (lambda t, j: t.pop("conv.weight#mask"), "got 'conv.weight#mask' missing"),
        (lambda t, j: t.update(extra=torch.ones(2)), "got none missing and 'extra' unknown$"),
        (
            lambda t, j: t.update({"conv.weight": torch.ones(16, 3, 3, 3)}),
            "got none missing and 'conv.weight' unknown$",
        ),
    ],
)
def test_forged_tensors_are_refused(saved, change, message):
    forge(saved, change)
    assert_refused(saved, network(1), message)


@pytest.mark.parametrize(
    "make", [lambda: network(1, width=8), lambda: network(1, torch.float16), lambda: nn.Linear(3, 3)]
)
def test_a_file_for_another_network_is_refused(saved, make):
    assert_refused(saved, make())


def test_masked_and_meta_models_are_refused(saved):
    with pytest.raises(ValueError, match=r"^model must be plain \(see finalize\), got masked layer 'conv'$"):
        load_jackpot(saved, pruned())
    with pytest.raises(
        ValueError, match=r"^model must hold memory to load into, got 'conv\.weight' on the meta device$"
    ):
        load_jackpot(saved, network(1).to("meta"))


def test_a_sharded_model_is_refused(saved, shard):
    message = r"^'conv\.weight' of model must be a plain tensor, got a DTensor "
    before = saved.read_bytes()
    for model in (network(), pruned()):
        with pytest.raises(TypeError, match=message):
            save_jackpot(shard(model), saved)
    assert saved.read_bytes() == before
    with pytest.raises(TypeError, match=message):
        load_jackpot(saved, shard(network()))


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"secret": 1}

    def set_extra_state(self, state):
        raise AssertionError


def test_what_is_no_tensor_is_refused_before_anything_is_written(path):
    with pytest.raises(
        TypeError, match=r"^state dict of model must hold tensors only, got dict for '_extra_state'$"
    ):
        save_jackpot(Extra(3, 3), path)
    with pytest.raises(TypeError, match=r"^source must be a string, got int$"):
        save_jackpot(pruned(), path, source=3)
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got dict$"):
        save_jackpot(dict(pruned().state_dict()), path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("function", [save_jackpot, lambda model, path: load_jackpot(path, model)])
def test_a_file_descriptor_is_no_path_and_stays_open(function, tmp_path):
    with open(tmp_path / "other", "w") as file:
        with pytest.raises(TypeError, match=r"^path must be a path, got int$"):
            function(network(), file.fileno())
        file.write("open")


# What survives a failure.


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(saved, monkeypatch, function, error):
    def fail(*args):
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)) as failed:
        save_jackpot(pruned(seed=4), saved)
    assert not isinstance(error, OSError) or failed.value.filename == str(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


FULL_DISK = """
import resource, sys, torch
from jackpot_kernels.files import save_jackpot
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    save_jackpot(torch.nn.Linear(100, 100), sys.argv[1])
except OSError as error:
    sys.exit(f"refused: {error.strerror}")
"""


def test_a_full_disk_leaves_the_old_file_alone(saved):
    before = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, saved], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("refused: File too large"), done.stderr
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_link_stays_a_link_and_the_file_has_ordinary_rights(saved, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(saved)
    save_jackpot(pruned(seed=4), link)
    assert link.is_symlink() and bits(finalize(pruned(seed=4))) == bits(loaded(saved))
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask


def loaded(path):
    fresh = network(1)
    load_jackpot(path, fresh)
    return fresh
