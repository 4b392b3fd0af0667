"""What the commands share: errors in one sentence, tables, models and data by name."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from jackpot_kernels.cli import is_extra, missing_extra
from jackpot_kernels.data import DATA
from jackpot_kernels.models import MODELS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset


def fail(sentence: str) -> NoReturn:
    """End with one sentence on stderr and exit code 2."""
    typer.echo(f"jackpot: {sentence}", err=True)
    raise typer.Exit(2)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn errors that a person can mend into one sentence: for setting up, not for the work itself."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not is_extra(error):
            raise
        fail(missing_extra(error))
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except (TypeError, ValueError) as error:
        fail(str(error))
    except RuntimeError as error:
        from jackpot_kernels.kernels.availability import BackendUnavailableError

        if not isinstance(error, BackendUnavailableError):
            raise
        fail(str(error))


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turn a failure to write what an option names into one sentence."""
    try:
        yield
    except OSError as error:
        fail(f"{option} must be a path that can be written to, got {path} ({error.strerror or error})")


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table, its figures to the right; without a header it is a list of names and values.

    Paths and what a file says of itself are shown as they are: no markup, and no codes for the terminal.
    """
    title = title and _shown(title)
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if name and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_shown, row))
    Console(highlight=False, markup=False).print(table)


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def resolve(option: str, name: str, known: Mapping[str, str]) -> Any:
    """Return what the callable that ``name`` stands for returns.

    Args:
        option: what an error calls it.
        name: one of ``known``, or ``module:callable``; modules are also looked for in the working directory.
    """
    module_name, _, attribute = known.get(name, name).partition(":")
    if not module_name or not attribute:
        fail(f"{option} must be {', '.join(known)} or module:callable, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except AttributeError:
        fail(f"{option} must name a callable of module {module_name!r}, got {name!r}")
    except Exception as error:
        fail(f"{option} must name a module that can be imported, got {name!r} ({_told(error)})")
    if not callable(function):
        fail(f"{option} must name a callable, got {name!r}, a {type(function).__name__}")
    try:
        return function()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and is_extra(error):
            raise
        if name in known and isinstance(error, OSError | ValueError | ModuleNotFoundError):
            fail(str(error))
        fail(
            f"{option} must be a callable that needs no argument and succeeds, got {name!r} ({_told(error)})"
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def build_model(name: str, weights: Path | None = None) -> "nn.Module":
    """Return the network that ``name`` stands for, with ``weights`` loaded."""
    from torch import nn

    model = resolve("model", name, MODELS)
    if not isinstance(model, nn.Module):
        fail(f"model must return a torch.nn.Module, got {type(model).__name__} from {name!r}")
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: "nn.Module", path: Path) -> None:
    """Load a safetensors file with exactly the model's names and shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from jackpot_kernels.search.state import load_exactly

    try:
        loaded = load_file(path)
    except FileNotFoundError:
        fail(f"weights must be an existing file, got {path}")
    except (SafetensorError, OSError) as error:
        fail(f"weights must be a safetensors file, got {path} ({error})")
    load_exactly(f"weights of {path}", model, loaded)


def build_data(name: str) -> "tuple[Dataset, Dataset]":
    """Return the training and the test set that ``name`` stands for."""
    from jackpot_kernels.data import as_dataset

    pair = resolve("data", name, DATA)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        fail(f"data must return a pair (train, test), got {type(pair).__name__} from {name!r}")
    return as_dataset(pair[0], "training data"), as_dataset(pair[1], "test data")


def choose_device(name: str, *, search: bool = False) -> "torch.device":
    """Return the device; "auto" is CUDA where there is one that can do the work.

    Args:
        search: the work needs the compiled kernels for the device, and not only torch.
    """
    import torch

    from jackpot_kernels._extension import build_facts

    without_kernels = search and not build_facts()["cuda_archs"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not without_kernels else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # as no meta tensor can
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"device must be one that torch can use here, got {name!r}")
    if device.type != "cpu" and without_kernels:
        fail(f"device must be cpu where the extension was built without CUDA kernels, got {name!r}")
    return device
