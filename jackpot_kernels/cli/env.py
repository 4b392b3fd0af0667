"""``jackpot env``."""

import json as json_format
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from jackpot_kernels.cli.common import print_table


def env(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Print what is installed, what was built, and what can run here."""
    from jackpot_kernels.environment import environment

    facts = environment()
    if json:
        typer.echo(json_format.dumps(facts, indent=2))
    else:
        print_table(["", ""], list(_rows(facts)))


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", text) for key, text in _rows(value))
        else:
            yield (
                name,
                ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value),
            )
