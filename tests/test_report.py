import base64
import re

import pytest

from jackpot_kernels.report import (
    Figure,
    Table,
    plot_methods,
    search_figures,
    write_page,
    write_search_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def records():
    start = {
        "kind": "start",
        "settings": {"sparsity": 0.9, "lr": 0.1},
        "dense_loss": 0.1,
        "dense_accuracy": 0.99,
    }
    start |= {"test_loss": 2.3, "test_accuracy": 0.1}
    steps = [{"kind": "step", "step": t, "proposed": 40 * t, "granted": max(0, 9 - t)} for t in range(1, 9)]
    epochs = [
        {
            "kind": "epoch",
            "epoch": e,
            "step": 4 * e,
            "train_loss": 1 / e,
            "train_accuracy": 0.9,
            "test_loss": 2 / e,
        }
        | {"test_accuracy": 0.9375, "overlap": 0.97, "skipped_steps": 0, "seconds": 3.0}
        for e in (1, 2)
    ]
    layers = [
        {"name": "features.0", "weights": 200, "kept": 20, "overlap": 0.95},
        {"name": "classifier", "weights": 10, "kept": 10, "overlap": 1.0},
    ]
    end = {
        "kind": "end",
        "sparsity_masked": 0.9,
        "sparsity_overall": 0.857,
        "layers": layers,
        "seconds": 12.0,
    }
    return [start, *steps, *epochs, end]


def test_a_search_gets_its_five_plots(records, tmp_path):
    figures = search_figures(records, tmp_path)
    assert [f.path.name for f in figures] == [
        "accuracy.png",
        "loss.png",
        "swaps.png",
        "overlap.png",
        "layers.png",
    ]
    assert all(f.path.read_bytes().startswith(PNG) and f.path.stat().st_size > 5000 for f in figures)
    assert "93.75%" in figures[0].caption and "99.00%" in figures[0].caption
    assert "97.00%" in figures[3].caption


def test_plots_live_with_what_is_there(records, tmp_path):
    records[-2]["train_loss"] = None
    no_steps_no_end = [r for r in records if r["kind"] not in ("step", "end")]
    assert [f.path.name for f in search_figures(no_steps_no_end, tmp_path)] == [
        "accuracy.png",
        "loss.png",
        "overlap.png",
    ]
    assert search_figures(records[:3], tmp_path) == []


def test_the_report_is_one_page_that_stands_alone(records, tmp_path):
    path = write_search_report(records, tmp_path, facts={"model": "a<b>", "data": "digits"})
    page = path.read_text()
    for text in ("93.75%", "99.00%", "10.00%", "90.00%", "85.70%", "a&lt;b&gt;", "sparsity", "8 steps"):
        assert text in page
    assert "a<b>" not in page
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 5
    for image in images:
        kind, data = image.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_skipped_steps_are_told(records, tmp_path):
    records[-2]["skipped_steps"] = 3
    assert (
        "8 steps, 3 of them skipped"
        in write_search_report(records, tmp_path, facts={"model": "m", "data": "d"}).read_text()
    )


def test_page_with_a_table(tmp_path):
    scores = {name: {0.9: (0.98, 0.01), 0.98: (0.5, 0.0)} for name in ("one", "two")}
    figure = plot_methods(scores, (0.99, 0.002), tmp_path / "methods.png")
    assert isinstance(figure, Figure)
    write_page(
        tmp_path / "page.html",
        title="t",
        lead="l",
        table=Table(["method", "90%"], [["one", "98.0"]]),
        figures=[figure],
    )
    page = (tmp_path / "page.html").read_text()
    assert "<th>90%</th>" in page and "<td>98.0</td>" in page
