import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import cpuinfo
import pytest
import torch
from triton import knobs

from jackpot_kernels import _extension
from jackpot_kernels.environment import environment
from jackpot_kernels.kernels import availability


def test_facts_are_those_of_this_process():
    facts = environment()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["jackpot_kernels"] == facts["extension"]["version"]
    assert facts["extension"]["digest"] == _extension.source_digest(_extension.CHECKOUT / "csrc")
    told = cpuinfo.get_cpu_info()  # a dependency of pytest-benchmark
    assert facts["cpu"]["processor"].startswith(told.get("brand_raw", platform.processor()))
    assert facts["cpu"]["processor"].endswith(str(told.get("model", "")))
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cuda"]["available"] == torch.cuda.is_available()
    assert set(facts["backends"]) == {"dense", "fused", "mixed", "reference"}
    assert set(facts["tuning"]) == {"path", "entries", "devices"}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("wish", ["scalar", "abacus"])
def test_environment_variable_names_the_instruction_set(wish, tmp_path):
    script = (
        "import json; from jackpot_kernels.environment import environment; print(json.dumps(environment()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={"JACKPOT_CPU": wish, "PYTHONPATH": str(_extension.CHECKOUT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    capability = json.loads(answer.stdout)["cpu"]["capability"]
    if wish == "scalar":
        assert capability == "scalar"
    else:
        assert capability.startswith("unknown (RuntimeError: ")
        assert "abacus" in capability


def test_backends_say_where_they_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends = environment()["backends"]
    assert backends["dense"] == backends["reference"] == "runs on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends = environment()["backends"]
    assert backends["reference"] == "runs on cpu and cuda"
    built = bool(_extension.build_facts()["cuda_archs"])
    assert backends["dense"].startswith("runs on cpu and cuda" if built else "runs on cpu, not on cuda: ")


def test_fused_says_where_it_runs_or_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert environment()["backends"]["fused"] == "runs on cpu and cuda, in Triton's interpreter"
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert environment()["backends"]["fused"].startswith("does not run: it needs CUDA tensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends = environment()["backends"]
    assert backends["fused"] == backends["mixed"] == "runs on cuda"
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert environment()["backends"]["fused"].startswith("does not run: triton is not installed")


def test_a_machine_without_triton_has_an_environment():
    """Triton is an extra: nothing that is loaded for the command needs it."""
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(('triton', 'triton.language'))); sys.argv[1:] = ['env']"
    )
    command = [sys.executable, "-c", f"{hide}; from jackpot_kernels.cli import main; main()"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "does not run: " in shown.stdout


def test_failed_probe_leaves_the_others(monkeypatch):
    def broken():
        raise OSError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    facts = environment()
    assert facts["cuda"] == "unknown (OSError: no driver)"
    assert facts["versions"]["torch"] == torch.__version__


def test_missing_package_is_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("jackpot_kernels.environment.version", absent)
    assert environment()["versions"]["triton"] == "not installed"
