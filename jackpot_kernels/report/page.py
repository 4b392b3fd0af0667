"""One self-contained HTML page: headline figures, a table, plots and settings."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, select_autoescape

from jackpot_kernels.report.plots import Figure

Pairs = Sequence[tuple[str, str]]


class Table(NamedTuple):
    """Cells as text; the first column stands to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of the page with a heading of its own."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    table: Table | None = None
    figures: Sequence[Figure] = ()


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    headlines: Pairs = (),
    table: Table | None = None,
    figures: Sequence[Figure] = (),
    sections: Sequence[Section] = (),
    facts: Pairs = (),
) -> None:
    """Write the page with its plots inside, so that it can be moved and mailed alone."""
    environment = Environment(
        loader=PackageLoader("jackpot_kernels.report", ""),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        title=title,
        lead=lead,
        headlines=headlines,
        sections=[Section("", (), table, figures), *sections],
        embedded=_embedded,
        facts=facts,
    )
    path.write_text(page, encoding="utf-8")


def _embedded(figure: Figure) -> str:
    """Return the plot as text."""
    return b64encode(figure.path.read_bytes()).decode()
