"""The report of one training, made from its log alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jackpot_kernels.report.page import write_page
from jackpot_kernels.report.plots import training_figures


def write_training_report(
    records: Sequence[Mapping[str, Any]], folder: Path, facts: Mapping[str, str]
) -> Path:
    """Draw the plots into ``folder`` and write ``report.html`` with them; return its path.

    Args:
        records: the log of a training that has ended.
        facts: ``model``, ``data`` and further lines for the list of settings.
    """
    start = next(record for record in records if record["kind"] == "start")
    last = [record for record in records if record["kind"] == "epoch"][-1]
    end = next(record for record in records if record["kind"] == "end")
    path = folder / "report.html"
    write_page(
        path,
        title=f"{facts['model']}, trained on {facts['data']}",
        lead=(
            f"{start['parameters']:,} parameters trained for {last['epoch']} epochs, {last['step']:,} steps, "
            f"{end['seconds']:.0f} s."
        ),
        headlines=[
            ("test accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
            ("training accuracy, last epoch", f"{last['train_accuracy']:.2%}"),
            ("test accuracy, start", f"{start['test_accuracy']:.2%}"),
        ],
        figures=training_figures(records, folder),
        facts=[(name, str(value)) for name, value in {**facts, **start["settings"]}.items()],
    )
    return path
