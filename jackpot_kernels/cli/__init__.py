"""The command line: ``jackpot``."""

import sys
import warnings

EXTRAS = {"typer", "rich", "matplotlib", "sklearn", "jinja2"}


def main() -> None:
    """Run the command line."""
    try:
        from jackpot_kernels.cli.app import app
    except ModuleNotFoundError as error:
        if not is_extra(error):
            raise
        sys.exit(missing_extra(error))
    warnings.formatwarning = lambda message, *place, **line: f"jackpot: {message}\n"
    app()


def is_extra(error: ModuleNotFoundError) -> bool:
    """Tell whether what is missing comes with the command line's extra."""
    return (error.name or "").partition(".")[0] in EXTRAS


def missing_extra(error: ModuleNotFoundError) -> str:
    return f'jackpot needs {error.name}, which is not installed: run pip install "jackpot_kernels[cli]"'
