"""The finished runs: JSON lines, one a run, appended as each ends."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper.scales import Run
from jackpot_kernels.search.folder import finite

Result = dict[str, Any]


class Results:
    """The runs that a folder holds, by key.

    A last line that was not written to its end is dropped, so that its run is made again.

    Raises:
        ValueError: when another line is no result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "results.jsonl"
        self._by_key: dict[str, Result] = {}
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._whole = content.rfind(b"\n") + 1  # bytes of the lines that have an end
        self.dropped = len(content) - self._whole
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            result = self._parse(number, line)
            self._by_key[result["key"]] = result

    def _parse(self, number: int, line: bytes) -> Result:
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict) or not result.keys() >= {"key", "configuration", "seconds"}:
            raise ValueError(f"{self.path} must hold a result on each line, got line {number} with none")
        return result

    def __contains__(self, run: object) -> bool:
        return isinstance(run, Run) and run.key in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, run: Run) -> Result | None:
        return self._by_key.get(run.key)

    def values(self) -> Iterable[Result]:
        return self._by_key.values()

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a result; it is on disk when this returns, as a whole line or as one to be dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # Unless another process has dropped the half line since, and written whole ones after it.
            if self.dropped and file.seek(0, os.SEEK_END) == self._whole + self.dropped:
                file.truncate(self._whole)
            self.dropped = 0
            file.write(json.dumps(finite(result), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._by_key[result["key"]] = dict(result)
