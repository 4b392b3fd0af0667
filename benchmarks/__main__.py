"""Run every benchmark and write the report: ``python -m benchmarks``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.report import RESULTS, write_report

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Return pytest's exit code; nothing is written unless every benchmark ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks: shows that it runs, measures nothing"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    output = options.output or (Path("build/rehearsal") if options.quick else RESULTS)
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        code = pytest.main(_pytest_arguments(raw, options.quick))
        if code == 0:
            written = write_report(raw, output)
            print((written / "table.md").read_text(), f"Written to {written}", sep="\n")
    return int(code)


def _pytest_arguments(raw: Path, quick: bool) -> list[str]:
    return [
        str(FOLDER),
        f"--rootdir={FOLDER.parent}",
        "--override-ini=python_files=bench_*.py",
        "--override-ini=python_functions=bench_*",
        "--benchmark-only",
        "--benchmark-columns=median,iqr,rounds",
        f"--benchmark-json={raw}",
        "--quiet",
        *(["--quick"] if quick else []),
    ]


if __name__ == "__main__":
    sys.exit(main())
