"""The command line: ``jackpot``."""

import sys
import warnings

EXTRAS = {"typer", "rich", "matplotlib", "sklearn", "jinja2"}


def main() -> None:
    """Run the command line."""
    try:
        from jackpot_kernels.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(missing_extra(error.name))
    warnings.formatwarning = lambda message, *place, **line: f"jackpot: {message}\n"
    app()


def missing_extra(module: str) -> str:
    return f'jackpot needs {module}, which is not installed: run pip install "jackpot_kernels[cli]"'
