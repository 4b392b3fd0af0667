"""Jackpot files: safetensors that hold packed mask bits and only the kept values of pruned layers.

For a weight ``key`` that is worth it the file has ``key#mask`` (the int32 words of ``pack_mask``) and
``key#values`` (the kept values in logical row-major order); every other entry of the state dict is stored as
it is, under its own name. The metadata entry ``jackpot`` is JSON: ``version``, ``layers`` (key to shape,
dtype and num_kept), ``aliases`` (key to the key that stores the same tensor), ``sparsity`` (masked and
overall), ``source``, and ``sha256`` over all names and contents, which older files lack.
"""

import errno
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from jackpot_kernels._validate import num_words, require_module, require_path, require_whole
from jackpot_kernels.convert import MaskedLayer, Sparsity, masked_layers, num_plain_weights, sparsity
from jackpot_kernels.ops.pack_mask import has_bits_after, pack_mask, unpack_mask

_VERSION = 1
_METADATA, _MASK, _VALUES = "jackpot", "#mask", "#values"
_LARGEST_HEADER = 100_000_008  # of safetensors itself
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class JackpotFileError(ValueError):
    """A file that is damaged, no jackpot file, or made for another network."""


class JackpotInfo(NamedTuple):
    """What a jackpot file says about itself."""

    sparsity: Sparsity
    source: str | None


def save_jackpot(model: nn.Module, path: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Write the pruned network to a safetensors file that ``load_jackpot`` reads into a fresh plain model.

    Pruned are the weights under a mask of 0 in masked layers, and those whose bits are +0 in plain
    ``nn.Linear`` and ``nn.Conv1d/2d/3d`` layers. Scores are not stored, and tensors that several names share
    are stored once. The file is written beside ``path`` and renamed, so an older file survives every failure.
    One network gives one file, byte for byte.

    Args:
        model: masked or finalized network.
        path: file to make or replace.
        source: where the weights came from, for people.

    Raises:
        TypeError: when ``model`` is no module, ``path`` no path, ``source`` no string, or an entry of the
            state dict no tensor, or a sharded one.
        OSError: when the file cannot be written.
    """
    require_path("path", path)
    if not isinstance(source, str | None):
        raise TypeError(f"source must be a string, got {type(source).__name__}")
    state = _tensor_state(model)
    masks, owners = _masks(model, state)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    stored: dict[Hashable, str] = {}
    for key, tensor in state.items():
        first = stored.setdefault((_identity(key, tensor), owners.get(key)), key)
        if first != key:
            aliases[key] = first
            continue
        dense, mask = tensor.detach().cpu(), masks.get(key)
        if mask is not None and _is_worth_packing(mask, dense):
            tensors[key + _MASK], tensors[key + _VALUES] = pack_mask(mask), dense[mask]
            layers[key] = {
                "shape": list(dense.shape),
                "dtype": _name(dense.dtype),
                "num_kept": int(mask.sum()),
            }
        else:
            pruned = dense if mask is None else dense.masked_fill(~mask, 0)
            tensors[key] = pruned.clone(memory_format=torch.contiguous_format)
    header = {
        "version": _VERSION,
        "layers": layers,
        "aliases": aliases,
        "sparsity": _sparsity(model, layers)._asdict(),
        "source": source,
    }
    header["sha256"] = _digest(tensors)
    write_whole(Path(path), save(tensors, {_METADATA: json.dumps(header)}))


def load_jackpot(path: str | os.PathLike[str], model: nn.Module) -> JackpotInfo:
    """Read a jackpot file into a plain model of the same architecture.

    Its outputs are then those of the saved network, bit for bit. The whole file is checked first, so a
    refused one leaves the model as it was. Nothing is unpickled. Dtype, device and memory format are those of
    ``model``. Modules that share a parameter part where the file holds several for it, as ``finalize`` leaves
    them.

    Returns:
        Sparsity and source as the file records them.

    Raises:
        JackpotFileError: when the file is truncated, foreign or malformed, or its names, shapes or dtypes are
            not those of ``model``.
        TypeError: when ``path`` is no path, ``model`` no module or a sharded one.
        ValueError: when ``model`` has masked layers or is on the meta device.
        OSError: when the file cannot be read.
    """
    require_path("path", path)
    if masked_layers(model):
        raise ValueError(
            f"model must be plain (see finalize), got masked layer {next(iter(masked_layers(model)))!r}"
        )
    state = _tensor_state(model)
    for key, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"model must hold memory to load into, got {key!r} on the meta device")
    tensors, header = _read(path, sum(tensor.nbytes for tensor in state.values()))
    info = _info(header)
    decoded = _decode(tensors, header, state)
    digest = _digest(tensors)
    if header.get("sha256", digest) != digest:
        raise JackpotFileError(f"tensors of {path} must have the SHA-256 that its header names, got {digest}")
    for owner, name in _parted(model, decoded, state):
        shared = owner.get_parameter(name)
        owner.register_parameter(name, nn.Parameter(shared.detach().clone(), shared.requires_grad))
    model.load_state_dict({name: decoded[_key(name)] for name in model.state_dict()})
    return info


def _key(name: str) -> str:
    """Return the name of an entry as it was before ``torch.compile`` wrapped a module."""
    return name.replace("_orig_mod.", "")


def _tensor_state(model: nn.Module) -> dict[str, Tensor]:
    require_module(model)
    state = {_key(name): value for name, value in model.state_dict().items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state dict of model must hold tensors only, got {type(value).__name__} for {key!r}"
            )
        require_whole(f"{key!r} of model", value)
    return state


def _masks(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the mask of every layer's weight by state dict key, and which masked layer owns the key.

    Scores and masks of masked layers are taken out of ``state``.
    """
    masks, owners = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = _key(f"{name}.") if name else ""
        key = f"{prefix}weight"
        if isinstance(module, MaskedLayer):
            masks[key], owners[key] = module.mask.cpu(), id(module)
            state.pop(f"{prefix}scores", None)
            state.pop(f"{prefix}mask_words", None)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and key in state:
            masks[key] = state[key].detach().cpu().contiguous().view(_BITS[state[key].element_size()]) != 0
    return masks, owners


def _identity(key: str, tensor: Tensor) -> Hashable:
    """Return what two names of one tensor have in common; an empty tensor has no address to compare."""
    address = tensor.data_ptr()
    return (tensor.device, address, tensor.dtype, tensor.shape, tensor.stride()) if address else key


def _is_worth_packing(mask: Tensor, weight: Tensor) -> bool:
    return 4 * num_words(mask.numel()) + int(mask.sum()) * weight.element_size() < weight.nbytes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sparsity(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> Sparsity:
    """Return the sparsity of a masked model, or that of a plain one over the layers stored packed."""
    if masked_layers(model):
        return sparsity(model)
    numel = sum(torch.Size(layer["shape"]).numel() for layer in layers.values())
    pruned = numel - sum(layer["num_kept"] for layer in layers.values())
    return Sparsity(masked=pruned / max(numel, 1), overall=pruned / max(num_plain_weights(model), 1))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write beside and rename, so that ``path`` holds the old file or the whole new one; a link stays one."""
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        # Renaming would put a file in the place of a device.
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: str | os.PathLike[str], dense_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a jackpot file; the tensors are views of the file."""
    with open(path, "rb") as file:
        size, limit = os.fstat(file.fileno()).st_size, dense_bytes + _LARGEST_HEADER
    if size > limit:
        raise JackpotFileError(f"path must hold at most {limit} bytes for this model, got {size} in {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise JackpotFileError(f"path must be a complete safetensors file, got {path}: {reason}") from None
    try:
        header = json.loads(metadata[_METADATA])
        version = header["version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise JackpotFileError(
            f"path must be a file that save_jackpot made, got {path} without its header"
        ) from None
    if version != _VERSION:
        raise JackpotFileError(f"version of {path} must be {_VERSION}, got {shorten(version)}")
    return tensors, header


def _table(header: Mapping[str, Any], entry: str) -> dict[str, Any]:
    table = header.get(entry)
    if not isinstance(table, dict):
        raise JackpotFileError(f"header entry {entry!r} must be a table, got {type(table).__name__}")
    return table


def _info(header: Mapping[str, Any]) -> JackpotInfo:
    fractions, source = _table(header, "sparsity"), header.get("source")
    found = [fractions.get(field) for field in Sparsity._fields]
    values = [value for value in found if isinstance(value, float | int) and 0 <= value <= 1]
    if len(values) != len(found):
        got = shorten(found)
        raise JackpotFileError(f"header entry 'sparsity' must hold fractions in [0, 1], got {got}")
    if not isinstance(source, str | None):
        raise JackpotFileError(f"header entry 'source' must be a string, got {type(source).__name__}")
    return JackpotInfo(Sparsity(*values), source)


def _decode(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the whole state dict, each entry checked against the model's."""
    layers, aliases = _table(header, "layers"), _table(header, "aliases")
    sources = {key: str(aliases.get(key, key)) for key in state}
    names = [
        n
        for s in dict.fromkeys(sources.values())
        for n in ((s + _MASK, s + _VALUES) if s in layers else (s,))
    ]
    _require_same_names("tensors", names, tensors)
    _require_same_names("header entry 'aliases'", [key for key in aliases if key in state], aliases)
    _require_same_names("header entry 'layers'", [key for key in layers if key in sources.values()], layers)
    decoded: dict[str, Tensor] = {}
    for key, source in sources.items():
        if source in layers:
            words, values = tensors[source + _MASK], tensors[source + _VALUES]
            decoded[key] = _unpack(key, words, values, layers[source], state[key])
        else:
            decoded[key] = tensors[source]
            _require_same_kind(key, decoded[key], state[key])
    return decoded


def _unpack(key: str, words: Tensor, values: Tensor, layer: Any, target: Tensor) -> Tensor:
    """Return the dense weight of a packed entry, once words, values, header and model agree."""
    shape, numel = list(target.shape), target.numel()
    length, num_values = num_words(numel), values.numel()
    wanted = {"shape": shape, "dtype": _name(target.dtype), "num_kept": num_values}
    if layer != wanted:
        raise JackpotFileError(f"header of {key!r} must be {wanted}, got {shorten(layer)}")
    if words.dtype != torch.int32 or list(words.shape) != [length]:
        got = f"{_name(words.dtype)} {list(words.shape)}"
        raise JackpotFileError(f"mask of {key!r} must be int32 [{length}], got {got}")
    if values.dtype != target.dtype or values.dim() != 1:
        got = f"{_name(values.dtype)} {list(values.shape)}"
        raise JackpotFileError(f"values of {key!r} must be {_name(target.dtype)} in one dimension, got {got}")
    if has_bits_after(words, numel):
        raise JackpotFileError(f"mask of {key!r} must have no bits after weight {numel}, got some")
    mask = unpack_mask(words, shape)
    if int(mask.sum()) != num_values:
        raise JackpotFileError(
            f"mask of {key!r} must keep {num_values} weights as the header says, got {int(mask.sum())}"
        )
    weight = torch.zeros(shape, dtype=values.dtype, device=values.device)
    weight[mask] = values
    return weight


def _require_same_kind(key: str, tensor: Tensor, target: Tensor) -> None:
    got, wanted = ((_name(t.dtype), list(t.shape)) for t in (tensor, target))
    if got != wanted:
        raise JackpotFileError(
            f"{key!r} must be {wanted[0]} {wanted[1]} as in the model, got {got[0]} {got[1]} in the file"
        )


def _require_same_names(what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        got = f"{_some(missing)} missing and {_some(unknown)} unknown"
        raise JackpotFileError(f"{what} of the file must match the model, got {got}")


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names[:3])) or "none"
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


def _parted(
    model: nn.Module, decoded: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str]]:
    """Return the parameters that can no longer be one with another module's; refuse what cannot part."""
    parted: list[tuple[nn.Module, str]] = []
    of_tensor: dict[Hashable, str] = {}
    of_module: dict[Hashable, str] = {}
    for key, tensor in state.items():
        owner, name = _owner(model, key)
        other = of_tensor.setdefault(_identity(key, tensor), key)
        same = of_module.setdefault((id(owner), name), key)
        apart = not torch.equal(_bytes(decoded[key]), _bytes(decoded[other]))
        if apart and name in owner._parameters:
            parted.append((owner, name))
        elif apart:
            same = other
        if not torch.equal(_bytes(decoded[key]), _bytes(decoded[same])):
            raise JackpotFileError(
                f"{same!r} and {key!r} must be equal, being one tensor in the model, got two in the file"
            )
    return parted


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """Return the module that holds an entry of the state dict, and its name there."""
    path, _, name = key.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:  # a hook made the entry
        return model, key
    return getattr(owner, "_orig_mod", owner), name


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names and contents of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].nbytes}\n".encode())
        digest.update(_bytes(tensors[name]).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
