"""Where a search or a training keeps log and checkpoint, so that nothing is lost when it stops."""

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from jackpot_kernels.files import write_whole
from jackpot_kernels.search.epochs import EpochLoop, Record


class Stopped(Exception):
    """What runs was asked to stop, and its checkpoint is saved."""

    def __init__(self, step: int, total_steps: int):
        super().__init__(f"stopped at step {step} of {total_steps}")
        self.step, self.total_steps = step, total_steps


class RunFolder:
    """A folder with a log, one JSON record a line, and a checkpoint, replaced as a whole or not at all."""

    kind: ClassVar[str]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.log = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"

    def create(self) -> None:
        """Make the folder, for a new run.

        Raises:
            FileExistsError: when it already holds a checkpoint, or a log without one.
            OSError: when it cannot be written to.
        """
        if self.checkpoint.exists():
            raise FileExistsError(f"output must be a folder without a checkpoint, got {self.path} with one")
        if self.log.exists() and self.log.stat().st_size > 0:
            raise FileExistsError(f"output must be a folder without a log, got {self.log} and no checkpoint")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.log.touch()
        except OSError as error:
            raise OSError(
                f"output must be a folder that can be written to, got {self.path} ({error.strerror})"
            ) from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out while this one goes on, however it ends; where the system has no locks, do not.

        Raises:
            BlockingIOError: when another run is at work here.
        """
        with self.log.open("a") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"output must be a folder in which no other run is at work, got {self.path}"
                ) from None
            except (ImportError, OSError):
                pass
            yield

    def write(self, record: Record) -> None:
        """Append a record to the log; NaN and infinities become null."""
        with self.log.open("a") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def records(self) -> list[Record]:
        """Return what the log holds.

        Raises:
            ValueError: when that is not the records of a run from its start on.
        """
        lines = self.log.read_text().splitlines()
        try:
            records: list[Record] = [json.loads(line) for line in lines]
            kinds = [record["kind"] for record in records]
        except (ValueError, TypeError, KeyError):
            kinds = []
        if kinds[:1] != ["start"]:
            raise ValueError(f"log must hold the records of a {self.kind} from its start on, got {self.log}")
        return records

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint beside the old one, then rename it.

        Raises:
            OSError: when it cannot be written; the old one is then as it was.
        """
        # In memory first: torch.save tells of a full disk by a RuntimeError of its own.
        content = io.BytesIO()
        torch.save({**state, "kind": self.kind, "log_bytes": self.log.stat().st_size}, content)
        write_whole(self.checkpoint, content.getbuffer())

    def load(self) -> dict[str, Any]:
        """Return the checkpoint's state; nothing is unpickled but tensors, numbers and names.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged or no checkpoint of this kind.
        """
        if not self.checkpoint.is_file():
            raise FileNotFoundError(
                f"output must hold the checkpoint of a {self.kind}, got {self.path} without"
            )
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"checkpoint must be whole, got {self.checkpoint} ({type(error).__name__})"
            ) from None
        known = isinstance(state, dict) and state.keys() >= {"settings", "model", "position", "log_bytes"}
        if not known or state.get("kind", "search") != self.kind:
            raise ValueError(f"checkpoint must be that of a {self.kind}, got {self.checkpoint}")
        return state

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Drop from the log what was written after the checkpoint.

        Raises:
            ValueError: when the log is shorter than the checkpoint says.
        """
        size = self.log.stat().st_size if self.log.is_file() else 0
        if size < state["log_bytes"]:
            raise ValueError(f"{self.log} must hold at least {state['log_bytes']} bytes, got {size}")
        with self.log.open("r+b") as file:
            file.truncate(state["log_bytes"])


class SearchFolder(RunFolder):
    """The folder of a search."""

    kind = "search"


class TrainingFolder(RunFolder):
    """The folder of a training."""

    kind = "training"


def run(
    loop: EpochLoop[Any],
    folder: RunFolder,
    *,
    extra: Mapping[str, Any],
    watch: Callable[[Record], None],
    should_stop: Callable[[], bool],
) -> None:
    """Run a loop to its end, with a line in the log for each record and a checkpoint each epoch.

    Args:
        extra: entries that every checkpoint carries besides the state of the loop.
        watch: called with every record, ticks included.
        should_stop: asked after every record; when true, the checkpoint is saved at this very step.

    Raises:
        Stopped: when ``should_stop`` said so.
        OSError: when log or checkpoint cannot be written; the last checkpoint is then as it was.
    """
    for record in loop.run():
        if record["kind"] != "tick":
            folder.write(record)
        watch(record)
        stop = should_stop() and record["kind"] != "end"
        if stop or record["kind"] == "epoch":
            folder.save({**loop.state_dict(), **extra})
        if stop:
            raise Stopped(loop.step, loop.total_steps)


def finite(value: Any) -> Any:
    """Replace NaN and infinities, for which JSON has no word, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list) else value
