"""Runs as jobs of Slurm's stand-in and of a Ray of this machine, where submitit and Ray are installed."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from kw_lightning.errors import RunError
from kw_lightning.sweep.engines import STOPPED, engine_of
from kw_lightning.sweep.processes import Begin, Job, Running

OPTIONS = {"slurm": {"cluster": "local", "timeout_min": 5}, "ray": {"num_cpus": 1}}
WAITS = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def job(folder: Path, name: str, script: str) -> Job:
    return Job(name, 0, (sys.executable, "-S", "-c", script), folder / f"{name}.log")


def wait(run: Running) -> int:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        code = run.poll()
        if code is not None:
            return code
        time.sleep(0.1)
    raise AssertionError("it goes on")


@pytest.fixture(params=["slurm", "ray"])
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Begin:
    pytest.importorskip("submitit" if request.param == "slurm" else "ray", reason="the engine is not installed")
    found = engine_of(request.param, tmp_path, OPTIONS[request.param])
    assert found is not None
    return found


def test_runs_end_with_their_exit_codes_and_a_stopped_one_whole(begin: Begin, tmp_path: Path) -> None:
    good, bad = begin(job(tmp_path, "good", "print('fine')"), 0), begin(job(tmp_path, "bad", "raise SystemExit(3)"), 1)
    assert (wait(good), wait(bad)) == (0, 3)
    assert "fine" in (tmp_path / "good.log").read_text()
    waits = begin(job(tmp_path, "waits", WAITS), 0)
    log = tmp_path / "waits.log"
    ready = threading.Event()
    for _ in range(1200):
        if log.exists() and "ready\n" in log.read_text():
            ready.set()
            break
        time.sleep(0.1)
    assert ready.is_set()
    waits.stop(signal.SIGINT)
    assert wait(waits) == STOPPED
    for _ in range(100):
        if "saved" in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize(("name", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_names_its_extra(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RunError, match=rf"pip install 'kw-lightning\[{name}\]'"):
        engine_of(name, tmp_path, {})


def test_options_that_an_engine_does_not_know_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the engine is not installed")
    with pytest.raises(RunError, match="submitit refuses"):
        engine_of("slurm", tmp_path, {"cluster": "local", "partitoin": "gpu"})
    with pytest.raises(RunError, match="submitit refuses"):  # there is no Slurm here
        engine_of("slurm", tmp_path, {})
