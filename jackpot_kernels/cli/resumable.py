"""What the commands that run for long share: resuming, Ctrl-C, and a progress bar."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jackpot_kernels.cli.common import DATA, MODELS, fail, one_sentence, stderr, writing

if TYPE_CHECKING:
    from jackpot_kernels.search.epochs import EpochLoop, Record
    from jackpot_kernels.search.folder import RunFolder

Names = dict[str, str]
Settings = TypeVar("Settings")
Loop = TypeVar("Loop", bound="EpochLoop[Any]")


def run_in_folder(
    context: typer.Context,
    folder: "RunFolder",
    kind: Callable[..., Settings],
    build: Callable[[Settings, Names], Loop],
    figure: Callable[["Record"], str] | None = None,
) -> tuple[Loop, Names]:
    """Run what the command line asks for to its end, from the start or from the checkpoint in ``folder``.

    Args:
        context: of the command, with the options ``model``, ``data``, ``resume`` and all fields of ``kind``.
        folder: where log and checkpoint are.
        kind: the dataclass of the settings.
        build: makes the loop from settings and names; what it refuses is told in one sentence.
        figure: what else the progress bar tells of a step.

    Returns:
        The loop at its end, and the names of model and data.
    """
    from jackpot_kernels.data import DataError
    from jackpot_kernels.search.folder import Stopped, run

    with ExitStack() as alone:
        with one_sentence():
            state = folder.load() if context.params["resume"] else None
            settings, names = _resumed(context, folder.kind, kind, state) if state else _new(context, kind)
            loop = build(settings, names)
            if not state:
                folder.create()
            alone.enter_context(folder.alone())
            if state:
                _go_on(loop, folder, state)
            else:
                _begin(loop, folder, names)
        resume = f"jackpot {context.info_name} --output {quote(str(folder.path))} --resume"
        try:
            with _progress(loop, figure) as watch, _stop_question() as should_stop:
                run(loop, folder, extra={"names": names}, watch=watch, should_stop=should_stop)
        except Stopped as stopped:
            typer.echo(f"{stopped}; go on with: {resume}", err=True)
            raise typer.Exit(130) from None
        except (OSError, DataError) as error:
            fail(f"{folder.kind} stopped by: {error}; go on from its last checkpoint with: {resume}")
    return loop, names


def _begin(loop: "EpochLoop[Any]", folder: "RunFolder", names: Names) -> None:
    start = loop.begin()
    with writing("output", folder.path):
        folder.write(start)
        folder.save({**loop.state_dict(), "names": names})


def _go_on(loop: "EpochLoop[Any]", folder: "RunFolder", state: dict[str, Any]) -> None:
    try:
        loop.load_state_dict(state)
    except (AttributeError, LookupError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"checkpoint must be whole, got {folder.checkpoint} ({found})") from None
    folder.rewind(state)


def _new(context: typer.Context, kind: Callable[..., Settings]) -> tuple[Settings, Names]:
    """Return settings and names as the command line gives them."""
    for option, known in (("model", MODELS), ("data", DATA)):
        if context.params[option] is None:
            fail(f"--{option} must be {', '.join(known)} or module:callable, got none")
    settings = kind(**{field.name: context.params[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    return settings, {"model": context.params["model"], "data": context.params["data"]}


def _resumed(
    context: typer.Context, what: str, kind: Callable[..., Settings], state: dict[str, Any]
) -> tuple[Settings, Names]:
    """Return settings and names as the checkpoint has them, and refuse others on the command line."""
    for part in ("settings", "names"):
        if not isinstance(state.get(part), dict):
            raise ValueError(f"checkpoint of the {what} must hold {part}, got {state.get(part)!r}")
    for option, value in {**state["settings"], **state["names"]}.items():
        source = context.get_parameter_source(option)
        given = context.params[option]
        if source is not None and source.name == "COMMANDLINE" and given != value:
            fail(f"{option} must be {value} as in the {what} to resume, got {given}")
    return kind(**state["settings"]), state["names"]


@contextmanager
def _progress(
    loop: "EpochLoop[Any]", figure: Callable[["Record"], str] | None
) -> Iterator[Callable[["Record"], None]]:
    """Show a progress bar and yield what it watches records with."""
    epochs, steps = loop.settings.epochs, loop.steps_per_epoch
    figures: dict[str, str] = {}

    def text(step: int) -> str:
        epoch = min(step // steps + 1, epochs)
        return "  ".join([f"epoch {epoch}/{epochs}", *figures.values()])

    columns = (BarColumn(bar_width=12), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=stderr()) as bar:
        task = bar.add_task(text(loop.step), total=loop.total_steps, completed=loop.step)

        def watch(record: "Record") -> None:
            if record["kind"] == "step":
                figures["loss"] = f"loss {record['loss']:.3f}"
                if figure is not None:
                    figures["more"] = figure(record)
            elif "test_accuracy" in record:
                figures["accuracy"] = f"accuracy {record['test_accuracy']:.2%}"
            bar.update(task, completed=record["step"], description=text(record["step"]))

        yield watch


@contextmanager
def _stop_question() -> Iterator[Callable[[], bool]]:
    """Yield a question that Ctrl-C or SIGTERM makes true; asked a second time, either ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
