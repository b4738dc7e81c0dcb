"""Runs as processes of this machine: as many at a time as wanted, ended whole by Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kw_lightning.callbacks.signals import InterruptedRunError, StopSignals
from kw_lightning.sweep.parent import VARIABLE

TICK = 0.1
GPUS = "CUDA_VISIBLE_DEVICES"
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a run that was asked to stop: after its checkpoint, or before it could have one."""


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        row: of the grid.
        seed: of the run.
        command: the command line of its process.
        log: the file that its output is added to.
    """

    row: str
    seed: int
    command: tuple[str, ...]
    log: Path


def kw(*arguments: str) -> tuple[str, ...]:
    """Return the command line of `kw` with these arguments, in the Python that runs here."""
    return (sys.executable, "-m", "kw_lightning.cli", *arguments)


class Watcher(Protocol):
    """Is told what happens."""

    def started(self, job: Job) -> None:
        """Hear that a run was started."""

    def ended(self, job: Job, code: int, seconds: float) -> None:
        """Hear that a run has ended, with this exit code."""

    def waiting(self, running: Sequence[Job]) -> None:
        """Hear that runs are at work, several times a second."""


class Running(Protocol):
    """A run that was begun."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""

    def stop(self, number: int) -> None:
        """Ask it to end whole, as this signal would."""

    def end(self) -> None:
        """End it now."""


Begin = Callable[[Job, int], Running]
"""Begins a job in one of the slots, which count from 0."""


def run_all(jobs: Sequence[Job], at_once: int, watcher: Watcher, begin: Begin | None = None) -> None:
    """Make runs, so many at a time.

    The first Ctrl-C asks every run to end with its checkpoint, as one Ctrl-C does with kw-fit, and waits for that; the
    second ends them at once, and what they had written before is kept.

    Args:
        jobs: the runs, in the order in which they begin.
        at_once: slots.
        watcher: is told what happens.
        begin: begins a run; by default as a process of this machine.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        InterruptedRunError: SIGTERM.
    """
    begin = begin or process_in(at_once)
    waiting = list(jobs)
    slots: dict[int, tuple[Job, Running, float]] = {}
    signals = StopSignals()
    signals.catch()
    told = False
    try:
        while slots or (waiting and not signals.wanted):
            for slot in range(at_once):
                if slot not in slots and waiting and not signals.wanted:
                    job = waiting.pop(0)
                    watcher.started(job)
                    slots[slot] = (job, begin(job, slot), time.monotonic())
            if signals.wanted and not told:
                told = True
                for _, run, _ in slots.values():
                    run.stop(signals.wanted)
            for slot, (job, run, since) in list(slots.items()):
                code = run.poll()
                if code is not None:
                    del slots[slot]
                    watcher.ended(job, code, time.monotonic() - since)
            watcher.waiting([job for job, _, _ in slots.values()])
            time.sleep(TICK)
    finally:
        for _, run, _ in slots.values():  # after a second Ctrl-C, or a fault of our own
            run.end()
        signals.release()
    if signals.wanted == signal.SIGTERM:
        raise InterruptedRunError("Interrupted", signal.SIGTERM)
    if signals.wanted:
        raise KeyboardInterrupt("Interrupted")


class Process:
    """A run as a process of this machine, in a group of its own, which Ctrl-C of the terminal does not reach."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self._process = start(job, environment)

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._process.poll()

    def stop(self, number: int) -> None:
        """Send it the signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End it, and all that it started, now."""
        end(self._process)


def process_in(at_once: int) -> Begin:
    """Return what begins runs as processes of this machine, which share it between so many slots."""
    return lambda job, slot: Process(job, slot_environment(slot, at_once, os.environ))


def run_here(job: Job) -> int:
    """Make a run inside a task of another engine, and return its exit code; it ends whole when the task is ended."""
    process = start(job, os.environ)
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job's process in a group of its own; its output goes to the end of its log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        log.write(f"$ {shlex.join(job.command)}\n".encode(errors="replace"))
        log.flush()
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, VARIABLE: str(os.getpid())},
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a job and all that it started, now."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def slot_environment(
    slot: int, at_once: int, environment: Mapping[str, str], *, cores: int | None = None, gpus: int | None = None
) -> dict[str, str]:
    """Return the environment of the job in a slot: its share of the cores and, of several GPUs, one of its own.

    Args:
        slot: from 0 on.
        at_once: slots.
        environment: of this process; what it says of threads holds, and of the GPUs those that it names are used.
        cores: that this process may use; None asks the system.
        gpus: of the machine; None asks torch.
    """
    changed = {**environment, "PYTHONSAFEPATH": "1"}  # -m would look for modules in the current folder first
    if at_once == 1:
        return changed
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    changed.setdefault("OMP_NUM_THREADS", str(max(cores // at_once, 1)))
    if GPUS in environment:
        names = [name for name in environment[GPUS].split(",") if name]
    else:
        names = [str(number) for number in range(torch.cuda.device_count() if gpus is None else gpus)]
    if names:
        changed[GPUS] = names[slot % len(names)]
    return changed
