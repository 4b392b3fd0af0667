import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import jackpot_kernels as jk
from jackpot_kernels.kernels import availability
from jackpot_kernels.ops import dispatch
from jackpot_kernels.ops.dispatch import Problem, Rule, choose_backend, decide, rules_for

AVAILABLE = ("dense", "fused")


def choose(backend="auto", op="masked_linear", shape=(6, 9), weight=(5, 9), groups=1):
    return choose_backend(op, backend, AVAILABLE, torch.ones(shape), torch.ones(weight), groups)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("JACKPOT_BACKEND", raising=False)


@pytest.fixture
def rules(monkeypatch):
    """Set the rules of a device, and forget those that were looked up."""

    def set_rules(table):
        monkeypatch.setattr(dispatch, "RULES", table)
        monkeypatch.setattr(dispatch, "_rules_found", {})

    return set_rules


def test_device_that_was_not_measured_gets_dense():
    assert choose() == "dense"


def test_order_of_wishes(monkeypatch):
    monkeypatch.setenv("JACKPOT_BACKEND", "reference")
    assert choose() == "reference"
    with jk.use_backend("fused"):
        assert choose() == "fused"
        with jk.use_backend("dense"):
            assert choose() == "dense"
        assert choose() == "fused"
        assert choose("reference") == "reference"
    assert choose() == "reference"
    with jk.use_backend("auto"):
        assert choose() == "reference"


def test_context_ends_with_an_error():
    with pytest.raises(KeyError), jk.use_backend("fused"):
        raise KeyError
    assert choose() == "dense"


def test_environment_variable_reaches_the_layers(monkeypatch):
    monkeypatch.setenv("JACKPOT_BACKEND", "reference")
    layer = jk.MaskedLinear(9, 5)
    layer.weight.requires_grad_(False)
    layer(torch.ones(2, 9))
    assert layer.cached_effective_weight is None


def test_first_rule_that_holds_decides(rules):
    few = Rule("fused", lambda problem: problem.tokens <= 8)
    wide = Rule("reference", lambda problem: problem.rows > 100)
    rules({"gpu*": {"masked_linear": (wide,)}, "cp?": {"masked_linear": (few, wide)}})
    assert choose() == "fused"
    assert choose(shape=(2, 5, 9)) == "dense"
    assert choose(shape=(2, 5, 9), weight=(101, 9)) == "reference"
    assert choose(shape=(9,), weight=(101, 9)) == "fused"
    assert choose(op="masked_conv", shape=(1, 9, 2, 2), weight=(5, 9, 1, 1)) == "dense"
    assert choose("dense") == "dense"


def test_score_gradients_of_large_linears_and_few_tokens_are_fused_on_an_h100():
    of_linear = rules_for("NVIDIA H100 80GB HBM3")["masked_linear"]

    def decided(tokens, rows, dtype):
        return decide(of_linear, Problem(tokens, rows, 768, (), 1, dtype))

    assert decided(1024, 768, torch.bfloat16) == decided(1, 768, torch.float16) == "mixed"
    assert decided(1025, 768, torch.bfloat16) == "dense"
    assert decided(64, 10, torch.bfloat16) == "dense"
    assert decided(64, 768, torch.float32) == "dense"
    assert rules_for("NVIDIA H200") == {}


def test_score_gradients_of_a_wide_first_convolution_are_fused_on_an_h100():
    of_conv = rules_for("NVIDIA H100 80GB HBM3")["masked_conv"]

    def decided(images, rows, columns, window, dtype=torch.bfloat16, groups=1):
        return decide(of_conv, Problem(images * 32 * 32, rows, columns, (window, window), groups, dtype))

    assert decided(256, 64, 3, 3) == decided(128, 128, 1, 3, torch.float16) == "mixed"
    others = [(256, 32, 3, 3), (256, 64, 3, 7), (256, 64, 32, 3), (64, 64, 3, 3)]
    assert {decided(*other) for other in others} == {"dense"}
    assert decided(256, 64, 3, 3, torch.float32) == decided(256, 64, 1, 3, groups=64) == "dense"


def test_problem_of_a_convolution(rules):
    asked = []
    rules({"cpu": {"masked_conv": (Rule("fused", lambda problem: asked.append(problem) or True),)}})
    assert choose(op="masked_conv", shape=(2, 8, 5, 7), weight=(6, 4, 3, 1), groups=2) == "fused"
    assert asked == [Problem(2 * 5 * 7, 6, 4, (3, 1), 2, torch.float32)]


def test_auto_uses_dense_where_the_kernels_cannot_run(rules, monkeypatch):
    table = {"cpu": {"masked_linear": (Rule("fused", lambda problem: True),)}}
    rules(table)
    assert choose() == "fused"
    monkeypatch.setattr(dispatch, "why_not", lambda device: "nothing runs here")
    rules(table)
    assert choose() == "dense"


@pytest.mark.parametrize("x", [None, [1.0]])
def test_rules_leave_bad_operands_to_the_checks(rules, x):
    rules({"cpu": {"masked_linear": (Rule("fused", lambda problem: True),)}})
    weight = torch.ones(5, 9)
    with pytest.raises(TypeError, match=r"^x must be a tensor, got "):
        jk.masked_linear(x, weight, weight, weight.bool())


@pytest.mark.parametrize("groups", [0, None, "2"])
def test_rules_leave_bad_groups_to_the_checks(rules, groups):
    rules({"cpu": {"masked_conv": (Rule("fused", lambda problem: True),)}})
    weight = torch.ones(6, 4, 3, 3)
    with pytest.raises((TypeError, ValueError), match=r"^groups must "):
        jk.masked_conv2d(torch.ones(1, 8, 5, 5), weight, weight, weight.bool(), groups=groups)


def test_rules_are_asked_inside_one_graph(rules):
    rules({"cpu": {"masked_linear": (Rule("reference", lambda problem: problem.tokens <= 8),)}})
    layer = jk.MaskedLinear(9, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    for tokens in (4, 16):
        x = torch.randn(tokens, 9)
        torch.testing.assert_close(compiled(x), layer(x))


def test_context_reaches_a_compiled_layer():
    layer = jk.MaskedLinear(9, 5)
    layer.weight.requires_grad_(False)
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    compiled(torch.ones(2, 9))
    with jk.use_backend("reference"):
        compiled(torch.ones(2, 9))
    compiled(torch.ones(2, 9))
    dense, plain = graphs
    assert "masked_fill_" in dense and "masked_fill_" not in plain


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: choose("fast"), "backend must be one of auto, fused, mixed, dense, reference, got 'fast'"),
        (lambda: choose([]), "backend must be one of auto, fused, mixed, dense, reference, got []"),
        (
            lambda: jk.use_backend(np.ones(2)).__enter__(),
            "backend must be one of auto, fused, mixed, dense, reference, got array([1., 1.])",
        ),
        (
            lambda: choose_backend("masked_conv3d", "fused", ("dense",), None, None),
            "backend must be one of auto, dense, reference for masked_conv3d, got 'fused'",
        ),
        (
            lambda: jk.use_backend("cublas").__enter__(),
            "backend must be one of auto, fused, mixed, dense, reference, got 'cublas'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("JACKPOT_BACKEND", "cudnn")
    with pytest.raises(ValueError) as caught:
        choose()
    assert str(caught.value) == (
        "the environment variable JACKPOT_BACKEND must be one of "
        "auto, fused, mixed, dense, reference, got 'cudnn'"
    )
    assert choose("dense") == "dense"


MATRIX, ROW, IMAGE = torch.ones(5, 9), torch.ones(1, 2, 9), torch.ones(1, 2, 4, 4)
TAPS, WINDOW = torch.ones(3, 2, 3), torch.ones(3, 2, 3, 3)
CALLS = {
    "masked_linear": (MATRIX, MATRIX, MATRIX, MATRIX.bool()),
    "masked_conv1d": (ROW, TAPS, TAPS, TAPS.bool()),
    "masked_conv2d": (IMAGE, WINDOW, WINDOW, WINDOW.bool()),
    "masked_linear_score_grad_": (torch.ones(5, 9), torch.ones(5, 5), MATRIX, MATRIX),
    "masked_conv2d_score_grad_": (torch.ones(3, 2, 3, 3), torch.ones(1, 3, 2, 2), IMAGE, WINDOW),
}


def refusals():
    """Return what the functions that have kernels say where these cannot run."""
    sentences = set()
    for (name, tensors), backend in product(CALLS.items(), ("fused", "mixed")):
        with pytest.raises(RuntimeError) as caught:
            getattr(jk, name)(*tensors, backend=backend)
        sentences.add(str(caught.value))
    return sentences


def test_fused_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from test_dispatch import CALLS, jk, refusals
print(jk.masked_linear(*CALLS["masked_linear"]).tolist()[0][0])
print(*refusals())
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == [
        "9.0",
        'backend="fused" cannot run: triton is not installed: run `pip install triton`',
    ]


def test_fused_without_a_device(monkeypatch):
    monkeypatch.setattr(availability, "interpreting", lambda: False)
    assert refusals() == {
        'backend="fused" cannot run: '
        "it needs CUDA tensors, or TRITON_INTERPRET=1 in the environment, got tensors on cpu"
    }


def test_fused_on_an_old_device(monkeypatch):
    monkeypatch.setattr(availability, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    availability._too_old.cache_clear()
    assert availability.why_not(torch.device("cuda", 0)) == (
        "it needs a device of compute capability 8.0 or more, got Tesla T4 with 7.5"
    )
    availability._too_old.cache_clear()
