"""``jackpot bench``."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import jackpot_kernels
from jackpot_kernels.cli.common import fail

Quick = Annotated[bool, typer.Option(help="Tiny networks: shows that it runs, measures nothing.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the results.", show_default="benchmarks/results")
]


def bench(quick: Quick = False, output: Output = None) -> None:
    """Measure what a search costs against its baselines, and write a table, plots and the raw figures."""
    root = Path(jackpot_kernels.__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir():
        fail(f"bench must run from a clone of the repository, installed with `pip install -e .`, got {root}")
    if find_spec("pytest_benchmark") is None:
        fail('bench needs pytest-benchmark, which is not installed: run pip install "jackpot_kernels[test]"')
    command = [sys.executable, "-m", "benchmarks", *(["--quick"] if quick else [])]
    if output is not None:
        command += ["--output", str(output.resolve())]
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)
