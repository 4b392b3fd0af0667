"""The benchmark of the masked layers: right before it is timed, and with a report that hides nothing."""

import json
import os

import pytest
import torch

from benchmarks import bench_masked_layers as bench
from benchmarks.masked_layers_report import rules, targets, write_report
from benchmarks.shapes import FAMILIES, NETWORKS, TINY_FAMILIES, Layer, Shape
from jackpot_kernels.ops.dispatch import Problem, Rule

EXECUTORS = ["eager", "library", "dense", "fused"]
no_device = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a rehearsal is for where there is no device"
)


@no_device
def test_rehearsal_measures_every_shape_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    arguments = ["--smoke", "--output", str(tmp_path), "--commit", "abc", "--executors", *EXECUTORS]
    assert bench.main([*arguments, "--minutes", "0", "--compile-jobs", "2"]) == 0
    file = tmp_path / "cpu" / "masked_layers.json"
    assert json.loads(file.read_text())["rows"] == []
    assert "run it again to go on" in capsys.readouterr().out

    assert bench.main(arguments) == 0
    record = json.loads(file.read_text())
    wanted = {
        (family, str(layer), executor, mode)
        for family, layers in TINY_FAMILIES.items()
        for layer in layers
        for executor in EXECUTORS
        for mode in bench.MODES
    }
    layer = str(TINY_FAMILIES["tiny linears"][0])
    wanted |= {("tiny linears", layer, executor, "score gradient") for executor in ("library", "fused")}
    rows = record["rows"]
    assert {(r["family"], r["layer"], r["executor"], r["mode"]) for r in rows} == wanted
    assert len(rows) == len(wanted) and all(len(r["seconds"]) == 2 for r in rows)
    assert record["commit"] == "abc" and len(record["commands"]) == 2
    assert {f.name for f in file.parent.iterdir()} == {
        "masked_layers.json",
        "masked_layers.md",
        "masked_layers_tiny-linears.png",
        "masked_layers_tiny-convolutions.png",
    }
    assert "measures nothing" in capsys.readouterr().out

    monkeypatch.setattr(bench, "measure", None)
    assert bench.main(arguments) == 0
    assert json.loads(file.read_text())["rows"] == rows
    assert bench.main(["--rules", "--output", str(tmp_path)]) == 0


@no_device
def test_compiling_beforehand_leaves_no_choice_and_stops_at_no_failure(monkeypatch):
    monkeypatch.setenv("JACKPOT_CACHE", "as it was")
    made, make = [], bench.make_contender

    def contender(problem, executor):
        made.append((problem.shape, executor))
        if len(made) == 1:
            raise RuntimeError("does not compile")
        return make(problem, executor)

    monkeypatch.setattr(bench, "make_contender", contender)
    shapes = bench.todo(TINY_FAMILIES)
    bench.compile_some(shapes, "cpu")
    assert made[0] == (shapes[0][1], "mixed")  # and nothing more of that one
    assert made[1:] == [(shape, executor) for _, shape in shapes[1:] for executor in ("mixed", "fused")]
    assert not os.path.exists(os.environ["JACKPOT_CACHE"])


@no_device
def test_a_shape_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    require_right, (bad, good) = bench.require_right, TINY_FAMILIES["tiny linears"]
    monkeypatch.setattr(bench, "TINY_FAMILIES", {"tiny linears": [bad, good]})

    def wrong_once(problem, *others):
        if problem.shape == bad:
            raise AssertionError("wrong")
        require_right(problem, *others)

    monkeypatch.setattr(bench, "require_right", wrong_once)
    arguments = ["--smoke", "--output", str(tmp_path), "--commit", "abc", "--executors", "eager", "dense"]
    assert bench.main(arguments) == 1
    assert f"failed, and not measured: tiny linears: {bad}\n" in capsys.readouterr().out
    rows = json.loads((tmp_path / "cpu" / "masked_layers.json").read_text())["rows"]
    assert {row["layer"] for row in rows} == {str(good)}


def test_another_commit_starts_anew(tmp_path):
    file = tmp_path / "masked_layers.json"
    bench.save({"device": "cpu", "commit": "abc", "rows": [1]}, file)
    assert bench.load(file, {"device": "cpu", "commit": "abc"})["rows"] == [1]
    assert bench.load(file, {"device": "cpu", "commit": "abd"})["rows"] == []


@no_device
@pytest.mark.parametrize("what", ["output", "dx", "score gradient"])
def test_a_wrong_contender_is_not_timed(what):
    problem = bench.Problem(TINY_FAMILIES["tiny linears"][0], "cpu")
    right = bench.make_contender(problem, "dense")
    bench.require_right(problem, "dense", right)
    scales = {"output": (1.1, 0, 0), "dx": (1, 0.1, 0), "score gradient": (1, 0, 0.1)}[what]

    def wrong(x):
        y = right.forward(x * 1)
        y = y * scales[0]
        extra = scales[1] * x.sum() + scales[2] * right.parameter.sum()
        return y + (extra - extra.detach()).to(y.dtype)

    with pytest.raises(AssertionError, match=what):
        bench.require_right(problem, "dense", right._replace(forward=wrong))


def test_families_hold_every_shape_of_their_networks():
    for name, layers in FAMILIES.items():
        assert len(set(layers)) == len(layers)
        if name in NETWORKS:
            assert {layer.weight for layer in layers} == set(NETWORKS[name])
    assert sorted({layer.batch for layer in FAMILIES["ViT-B"]}) == [4**n for n in range(9)]
    # Images of 224 x 224: the multiplications that the authors of each network count, repeats left out.
    mobile: list[Shape] = [layer.weight for layer in FAMILIES["MobileNet-V1"]]
    assert len(mobile) == 1 + 9 + 9 + 1
    by_layer = {str(layer): layer.flops // 2 // 256 for layer in FAMILIES["MobileNet-V1"]}
    assert by_layer["512 -> 512, 1x1, 256 x 14²"] == 512 * 512 * 14 * 14
    repeats = 4 * sum(by_layer[f"512 -> 512, {kind}, 256 x 14²"] for kind in ("1x1", "3x3 depthwise"))
    assert round((sum(by_layer.values()) + repeats) / 1e6) == 569


def row(layer, mode, executor, seconds, family="ResNet-50"):
    return {
        "family": family,
        "shape": json.loads(json.dumps(list(layer))),
        "layer": str(layer),
        "mode": mode,
        "executor": executor,
        "median_s": seconds,
        "tflops": 1.0,
    }


def record(rows, memory=None):
    return {
        "device": "Test GPU",
        "commit": "abc",
        "versions": {"torch": "2.13"},
        "commands": ["a"],
        "rows": rows,
        "training memory": memory,
    }


POINTWISE = Layer((64, 64, 1, 1), 256, 56)
SQUARE = Layer((4096, 4096), 64)


def test_targets_are_met_not_met_or_not_yet_measured(tmp_path):
    assert {t.verdict for t in targets(record([]))} == {"not yet measured"}
    rows = [row(POINTWISE, "forward", "library", 8.0), row(POINTWISE, "forward", "fused", 10.0)]
    rows += [row(SQUARE, "both", *each) for each in (("eager", 4.0), ("dense", 2.0), ("fused", 1.8))]
    rows += [row(SQUARE, "score gradient", "library", 3.0), row(SQUARE, "score gradient", "fused", 2.0)]
    memory = {"reference": 700, "fused": 400, "effective weights and masks": 200}
    values = [(t.value and round(t.value, 6), t.verdict) for t in targets(record(rows, memory))]
    assert values == [
        (2.0, "met"),
        (None, "not yet measured"),
        (0.9, "**not met**"),
        (None, "not yet measured"),
        (1.5, "met"),
        (0.8, "**not met**"),
        (1.5, "met"),
    ]
    summary = write_report(record(rows, memory), tmp_path)
    report = (tmp_path / "masked_layers.md").read_text()
    assert report.startswith(summary) and "- commit: abc" in report
    assert "| 4096 -> 4096, 64 tokens | both | dense (auto) | 2000000.0 |  | 1 |  |" in report


def test_rules_take_what_gains_and_nothing_that_loses():
    def linear(tokens, fused, rows=4096):
        layer = Layer((rows, 4096), tokens)
        return [
            row(layer, mode, e, s)
            for mode in ("forward", "both")
            for e, s in (("dense", 1.0), ("fused", fused))
        ]

    rows = linear(1, 0.5) + linear(16, 0.5) + linear(64, 0.9) + linear(256, 1.3) + linear(16, 1.2, 128)
    depthwise = Layer((64, 1, 3, 3), 256, 56, 1, 64)
    rows += [
        row(depthwise, mode, e, s)
        for mode in ("forward", "both")
        for e, s in (("dense", 1.0), ("fused", 1.04))
    ]
    text = rules(record(rows))
    found = eval("{" + text + "}", {"Rule": Rule, "math": __import__("math")})
    assert list(found) == ["Test GPU*"] and list(found["Test GPU*"]) == ["masked_linear"]
    (rule,) = found["Test GPU*"]["masked_linear"]
    assert rule.backend == "fused"

    def holds(tokens, rows, dtype=torch.bfloat16):
        return rule.when(Problem(tokens, rows, 4096, (), 1, dtype))

    assert holds(1, 4096) and holds(64, 4096)
    assert not holds(256, 4096) and not holds(16, 128) and not holds(1, 4096, torch.float32)
    assert rules(record(linear(1, 1.2))) == "# none for Test GPU"

    # Of two backends that gain, the one that gains more, all in all.
    mixed = [{**row, "executor": "mixed", "median_s": 0.6} for row in rows if row["executor"] == "fused"]
    assert 'Rule("mixed", lambda p: p.dtype.itemsize == 2 and p.tokens <= 256' in rules(record(rows + mixed))


def test_auto_is_what_the_rules_say(monkeypatch, tmp_path):
    table = {"Test*": {"masked_linear": (Rule("mixed", lambda p: p.tokens <= 64),)}}
    monkeypatch.setattr("jackpot_kernels.ops.dispatch.RULES", table)
    rows = [
        row(Layer((4096, 4096), tokens), "both", executor, seconds)
        for tokens in (64, 256)
        for executor, seconds in (("dense", 3.0), ("mixed", 2.0), ("fused", 4.0))
    ]
    worst = next(t for t in targets(record(rows)) if t.title.startswith("best of"))
    assert (worst.value, worst.count) == (2 / 3, 2)
    write_report(record(rows), tmp_path)
    report = (tmp_path / "masked_layers.md").read_text()
    assert "| 4096 -> 4096, 64 tokens | both | mixed (auto) |" in report
    assert "| 4096 -> 4096, 256 tokens | both | dense (auto) |" in report
