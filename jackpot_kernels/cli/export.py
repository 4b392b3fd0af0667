"""``jackpot export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jackpot_kernels.cli.common import build_model, fail, one_sentence, writing
from jackpot_kernels.files import write_whole

if TYPE_CHECKING:
    from torch import nn


def export(
    source: Annotated[Path, typer.Argument(help="Output folder of a search, or a jackpot file.")],
    jackpot: Annotated[Path | None, typer.Option(help="Jackpot file to write.")] = None,
    dense: Annotated[Path | None, typer.Option(help="Plain state dict (safetensors) to write.")] = None,
    model: Annotated[str | None, typer.Option(help="The network; by default that of the search.")] = None,
) -> None:
    """Write the pruned network of a search, finished or not, as a jackpot file or a plain state dict."""
    if jackpot is None and dense is None:
        fail("export must be told what to write: give --jackpot FILE, --dense FILE or both, got neither")
    with one_sentence():
        from safetensors.torch import save

        from jackpot_kernels.convert import finalize, masked_layers
        from jackpot_kernels.files import save_jackpot

        network, name = _from_folder(source, model) if source.is_dir() else _from_file(source, model)
        if jackpot is not None:
            with writing("jackpot", jackpot):
                save_jackpot(network, jackpot, source=name)
            typer.echo(jackpot)
        if dense is not None:
            plain = finalize(network) if masked_layers(network) else network
            # Copies, because safetensors refuses tensors that share memory.
            state = {key: tensor.contiguous().clone() for key, tensor in plain.state_dict().items()}
            with writing("dense", dense):
                write_whole(dense, save(state))
            typer.echo(dense)


def _from_folder(folder: Path, model: str | None) -> "tuple[nn.Module, str | None]":
    """Return the masked network of a search, and where it came from."""
    from jackpot_kernels.convert import convert
    from jackpot_kernels.search.folder import SearchFolder
    from jackpot_kernels.search.state import load_exactly

    state = SearchFolder(folder).load()
    name = model or state["names"]["model"]
    network = convert(build_model(name))
    load_exactly(f"model in {folder}", network, state["model"])
    return network, name


def _from_file(file: Path, model: str | None) -> "tuple[nn.Module, str | None]":
    """Return the plain pruned network of a jackpot file, and where it came from."""
    from jackpot_kernels.files import load_jackpot

    if not file.exists():
        fail(f"source must be the output folder of a search or a jackpot file, got {file}, which is neither")
    if model is None:
        fail(f"model must be given with a jackpot file, got {file} alone")
    network = build_model(model)
    return network, load_jackpot(file, network).source
