import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from triton.runtime.errors import OutOfResources

from jackpot_kernels.environment import environment
from jackpot_kernels.kernels import tuning
from jackpot_kernels.kernels.tuning import Config, cache_facts, cache_file, choose

SLOW, FAST, HUGE = (Config({"BLOCK": size}, 4, 2) for size in (16, 32, 1024))
DURATION_MS = {16: 3.0, 32: 1.0, 64: 2.0}  # by block
KEY = (torch.bfloat16, 64, 128)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own, on disk and in memory."""
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_chosen", {})


class Clock:
    """A device whose launches take as long as DURATION_MS says, and which counts them."""

    def __init__(self):
        self.now_ms, self.launches, self.warm = 0.0, Counter(), False

    def run(self, config):
        if config is HUGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        block = config.values["BLOCK"]
        self.launches[block] += 1
        # The first launch compiles, and one was disturbed; what L2 holds makes the slow one fast.
        self.now_ms += 0.1 if self.warm and block == 16 else DURATION_MS[block]
        self.now_ms += 50 if self.launches[block] in (1, 4) else 0
        self.warm = True

    def flush(self):
        self.now_ms += 1.5
        self.warm = False

    def event(self, enable_timing):
        clock = self

        class Event:
            def record(self):
                self.at_ms = clock.now_ms

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return later.at_ms - self.at_ms

        return Event()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_flusher", lambda: clock.flush)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return clock


def forget(monkeypatch):
    """Stand for another process, which finds only what is on disk."""
    monkeypatch.setattr(tuning, "_chosen", {})


def test_interpreter_takes_the_first():
    if not torch.cuda.is_available():
        assert choose("op", KEY, [SLOW, FAST], pytest.fail) is SLOW


def test_single_configuration_is_not_timed(clock):
    assert choose("op", KEY, [FAST], pytest.fail) is FAST
    assert not cache_file().exists()


def test_fastest_is_timed_once_and_remembered(clock, monkeypatch):
    assert choose("op", KEY, [SLOW, FAST], clock.run) == FAST
    assert clock.launches[16] == clock.launches[32] > 3
    assert choose("op", KEY, [SLOW, FAST], pytest.fail) == FAST
    forget(monkeypatch)
    assert choose("op", KEY, [SLOW, FAST], pytest.fail) == FAST
    assert sorted(os.listdir(cache_file().parent)) == [cache_file().name]


@pytest.mark.parametrize("op, key", [("other", KEY), ("op", (torch.float16, 64, 128)), ("op", (*KEY, 1))])
def test_another_problem_is_timed_anew(op, key, clock):
    choose("op", KEY, [SLOW, FAST], clock.run)
    before = clock.launches.total()
    choose(op, key, [SLOW, FAST], clock.run)
    assert clock.launches.total() == 2 * before
    assert cache_facts()["entries"] == 2


def test_another_device_is_timed_anew(clock, monkeypatch):
    choose("op", KEY, [SLOW, FAST], clock.run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Another GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = clock.launches.total()
    choose("op", KEY, [SLOW, FAST], clock.run)
    assert clock.launches.total() == 2 * before
    assert cache_facts() == {
        "path": str(cache_file()),
        "entries": 2,
        "devices": ["Another GPU", "Test GPU"],
    }


def test_choice_that_is_no_candidate_any_more_is_timed_anew(clock, monkeypatch):
    choose("op", KEY, [SLOW, FAST], clock.run)
    forget(monkeypatch)
    newer = Config({"BLOCK": 64}, 4, 2)
    assert choose("op", KEY, [SLOW, newer], clock.run) == newer
    assert cache_facts()["entries"] == 1


def test_configuration_without_room_is_passed_over(clock):
    assert choose("op", KEY, [HUGE, SLOW], clock.run) == SLOW
    with pytest.raises(OutOfResources):
        choose("op", (*KEY, 2), [HUGE, HUGE], clock.run)
    assert cache_facts()["entries"] == 1


def test_nothing_is_timed_inside_a_graph_capture(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("op", KEY, [SLOW, FAST], pytest.fail) is SLOW
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose("op", KEY, [SLOW, FAST], clock.run) == FAST


@pytest.mark.parametrize("content", ["{", "[1]", '{"op": {}}', '{"[1, 2]": {}}', '{"[]": {}}', "\x80"])
def test_damaged_cache_is_ignored_and_replaced(content, clock):
    cache_file().parent.mkdir()
    cache_file().write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"^the tuning cache .*tuning\.json is ignored: "):
        assert choose("op", KEY, [SLOW, FAST], clock.run) == FAST
    assert cache_facts()["entries"] == 1


def test_cache_that_cannot_be_written(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert choose("op", KEY, [SLOW, FAST], clock.run) == FAST
    assert choose("op", KEY, [SLOW, FAST], pytest.fail) == FAST


def test_two_processes_leave_a_whole_file():
    script = """
import sys
from jackpot_kernels.kernels.tuning import Config, _remember
for i in range(50):
    _remember(f'["op", "GPU {sys.argv[1]}", "3", "{i}"]', Config({"BLOCK": 16}, 4, 2))
"""
    running = [subprocess.Popen([sys.executable, "-c", script, name]) for name in "ab"]
    while any(process.poll() is None for process in running):
        if cache_file().exists():
            json.loads(cache_file().read_text())
        time.sleep(0.01)
    assert [process.returncode for process in running] == [0, 0]
    assert cache_facts()["entries"] >= 50
    assert os.listdir(cache_file().parent) == [cache_file().name]


def test_environment_shows_the_cache(clock):
    assert environment()["tuning"] == {"path": str(cache_file()), "entries": 0, "devices": []}
    choose("op", KEY, [SLOW, FAST], clock.run)
    assert environment()["tuning"]["entries"] == 1
    assert environment()["tuning"]["devices"] == ["Test GPU"]


def test_default_place(monkeypatch):
    monkeypatch.delenv("JACKPOT_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_file()) == "/home/somebody/.cache/jackpot_kernels/tuning.json"
