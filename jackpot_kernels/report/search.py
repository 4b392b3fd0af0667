"""The report of one search, made from its log alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jackpot_kernels.report.page import write_page
from jackpot_kernels.report.plots import search_figures


def write_search_report(records: Sequence[Mapping[str, Any]], folder: Path, facts: Mapping[str, str]) -> Path:
    """Draw the plots into ``folder`` and write ``report.html`` with them; return its path.

    Args:
        records: the log of a search that has ended.
        facts: ``model``, ``data`` and further lines for the list of settings.
    """
    start = next(record for record in records if record["kind"] == "start")
    last = [record for record in records if record["kind"] == "epoch"][-1]
    end = next(record for record in records if record["kind"] == "end")
    path = folder / "report.html"
    skipped = f", {last['skipped_steps']} of them skipped" if last["skipped_steps"] else ""
    write_page(
        path,
        title=f"{end['sparsity_masked']:.1%} of {facts['model']} removed",
        lead=(
            f"A mask searched on {facts['data']} in {last['epoch']} epochs, {last['step']:,} steps{skipped}, "
            f"{end['seconds']:.0f} s. No weight was trained."
        ),
        headlines=[
            ("accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
            ("accuracy, dense", f"{start['dense_accuracy']:.2%}"),
            ("accuracy, starting mask", f"{start['test_accuracy']:.2%}"),
            ("sparsity, masked layers", f"{end['sparsity_masked']:.2%}"),
            ("sparsity, all weights", f"{end['sparsity_overall']:.2%}"),
        ],
        figures=search_figures(records, folder),
        facts=[(name, str(value)) for name, value in {**facts, **start["settings"]}.items()],
    )
    return path
