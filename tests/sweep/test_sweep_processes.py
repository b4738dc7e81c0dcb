"""Processes of a sweep: small ones, which stand for runs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kw_lightning.callbacks.signals import InterruptedRunError
from kw_lightning.sweep.processes import Job, run_all, slot_environment

WAITS = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, "ready", flush=True)
time.sleep(60)
"""


class Watcher:
    """Keeps what it is told, and sends signals once all that runs is ready."""

    def __init__(self, *signals: int) -> None:
        self.codes: dict[str, int] = {}
        self.running = self.most = 0
        self.signals = list(signals)
        self.begun: list[str] = []

    def started(self, job: Job) -> None:
        self.begun.append(job.row)
        self.running += 1
        self.most = max(self.most, self.running)

    def ended(self, job: Job, code: int, seconds: float) -> None:
        self.codes[job.row] = code
        self.running -= 1

    def waiting(self, running: Sequence[Job]) -> None:
        if self.signals and running and all("ready\n" in job.log.read_text() for job in running):
            threading.Timer(0.05, os.kill, (os.getpid(), self.signals.pop(0))).start()


def job(folder: Path, name: str, script: str) -> Job:
    return Job(name, 0, (sys.executable, "-S", "-c", script), folder / f"{name}.log")


def test_a_failed_run_does_not_end_the_others_and_logs_are_added_to(tmp_path: Path) -> None:
    watcher = Watcher()
    jobs = [job(tmp_path, "good", "print('fine')"), job(tmp_path, "bad", "raise SystemExit(3)")]
    run_all([*jobs, jobs[0]], 2, watcher)
    assert watcher.codes == {"good": 0, "bad": 3}
    assert (watcher.begun, watcher.most) == (["good", "bad", "good"], 2)
    assert (tmp_path / "good.log").read_text().count("fine\n") == 2
    assert (tmp_path / "good.log").read_text().startswith(f"$ {sys.executable} -S -c")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, InterruptedRunError)]
)
def test_a_signal_lets_runs_end_whole_and_starts_no_more(tmp_path: Path, number: int, error: type) -> None:
    watcher = Watcher(number)
    before = signal.getsignal(number)
    with pytest.raises(error):
        run_all([job(tmp_path, name, WAITS) for name in "abc"], 2, watcher)
    assert watcher.codes == {"a": 128 + number, "b": 128 + number}
    assert all("saved" in (tmp_path / f"{name}.log").read_text() for name in "ab")
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_runs_and_all_they_started_at_once(tmp_path: Path) -> None:
    watcher = Watcher(signal.SIGINT, signal.SIGINT)
    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all([job(tmp_path, "a", STUBBORN)], 1, watcher)
    assert time.monotonic() - since < 20
    started = int((tmp_path / "a.log").read_text().splitlines()[-1].split()[0])
    for _ in range(100):
        if not Path(f"/proc/{started}").exists() or "Z" in Path(f"/proc/{started}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the run started is still there")


def test_a_run_ends_when_its_sweep_is_gone(tmp_path: Path) -> None:
    script = (
        "from kw_lightning.sweep.parent import VARIABLE, end_with_parent; import os, time;"
        "end_with_parent(); print(os.environ.get(VARIABLE), flush=True); time.sleep(60)"
    )
    middle = (
        "import os, subprocess, sys; from kw_lightning.sweep.parent import VARIABLE;"
        f"p = subprocess.Popen([sys.executable, '-c', {script!r}], env={{**os.environ, VARIABLE: str(os.getpid())}},"
        "stdout=subprocess.PIPE); print(p.pid, p.stdout.readline(), flush=True); os._exit(0)"
    )
    printed = subprocess.run([sys.executable, "-c", middle], capture_output=True, text=True, timeout=60, check=True)
    number, left = printed.stdout.split()
    assert left == r"b'None\n'"  # what it starts itself does not look for the sweep
    for _ in range(200):
        if not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("it went on without its sweep")


def test_slots_share_cores_and_gpus_where_the_user_did_not() -> None:
    assert slot_environment(0, 1, {"A": "b"}) == {"A": "b", "PYTHONSAFEPATH": "1"}
    shared = slot_environment(3, 4, {}, cores=8, gpus=2)
    assert (shared["OMP_NUM_THREADS"], shared["CUDA_VISIBLE_DEVICES"]) == ("2", "1")
    own = slot_environment(1, 2, {"OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "4,7"}, cores=8, gpus=8)
    assert (own["OMP_NUM_THREADS"], own["CUDA_VISIBLE_DEVICES"]) == ("5", "7")
    assert slot_environment(1, 2, {"CUDA_VISIBLE_DEVICES": ""}, gpus=2)["CUDA_VISIBLE_DEVICES"] == ""
