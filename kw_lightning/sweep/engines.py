"""Where one machine is too small: runs as jobs of Slurm (submitit) or as tasks of Ray. The engine is theirs.

Both see the folder of the sweep by the same path on every machine, and the same Python environment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError, first_line, mistake, needs
from kw_lightning.sweep.processes import Begin, Job, run_here

ENGINES = ("local", "slurm", "ray")
STOPPED = 128 + signal.SIGTERM


def slurm(folder: Path, options: Mapping[str, Any]) -> Begin:
    """Return what begins a run as a job of Slurm.

    Args:
        folder: for submitit's own files.
        options: of submitit's `update_parameters`, as `slurm_partition`; `cluster: local` tries it without Slurm.

    Raises:
        RunError: no submitit, no Slurm, **or** an option that submitit does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise RunError(needs("--launcher slurm", "submitit", "slurm", error)) from None
    rest = {"timeout_min": 24 * 60, **options}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=rest.pop("cluster", "slurm"))
        executor.update_parameters(**rest)
    except Exception as error:  # a ValueError, RuntimeError or NameError, and each with a page of names
        raise RunError(f"submitit refuses --launcher slurm with these options: {first_line(error)}") from None
    return lambda job, slot: SlurmJob(executor.submit(SlurmRun(job)))


class SlurmRun:
    """What a job of Slurm calls; it comes back to the queue when its time is over, and goes on from its checkpoint."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> int:
        """Make the run and return its exit code."""
        return run_here(self.job)

    def checkpoint(self) -> Any:
        """Return what submitit puts into the queue again; the process ends with its checkpoint when its parent does."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(SlurmRun(self.job))


class SlurmJob:
    """A job in the queue or at work."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self._stopped = False

    def poll(self) -> int | None:
        """Return the exit code, None before the job has ended; 1 where Slurm ended it."""
        if not self._job.done():
            return None
        if self._job.exception() is not None:
            return STOPPED if self._stopped else 1
        return int(self._job.result())

    def stop(self, number: int) -> None:
        """Cancel the job: the run notices and writes its checkpoint."""
        self._stopped = True
        self._job.cancel(check=False)

    def end(self) -> None:
        """Cancel the job."""
        self._job.cancel(check=False)


def ray(options: Mapping[str, Any]) -> Begin:
    """Return what begins a run as a task of Ray.

    Args:
        options: of the task, as `num_cpus` and `num_gpus`, and `address` of the cluster; without it one starts here.

    Raises:
        RunError: no Ray, no such cluster, **or** an option that Ray does not know.
    """
    try:
        import ray as engine
    except ImportError as error:
        raise RunError(needs("--launcher ray", "ray", "ray", error)) from None
    rest = dict(options)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        engine.init(
            address=rest.pop("address", None), ignore_reinit_error=True, include_dashboard=False, log_to_driver=False
        )
        task = engine.remote(run_here).options(max_retries=0, **rest)
    except Exception as error:  # Ray has many
        raise RunError(f"Ray refuses --launcher ray with these options: {first_line(error)}") from None
    return lambda job, slot: RayTask(engine, task.remote(job))


class RayTask:
    """A task that waits for its resources or is at work."""

    def __init__(self, engine: Any, reference: Any) -> None:
        self._engine, self._reference = engine, reference
        self._stopped = False

    def poll(self) -> int | None:
        """Return the exit code, None before the task has ended; 1 where Ray lost it."""
        done, _ = self._engine.wait([self._reference], timeout=0)
        if not done:
            return None
        try:
            return int(self._engine.get(self._reference))
        except Exception:  # the task was cancelled, or its machine is gone
            return STOPPED if self._stopped else 1

    def stop(self, number: int) -> None:
        """Cancel the task: the run ends with its checkpoint."""
        self._stopped = True
        self._engine.cancel(self._reference)

    def end(self) -> None:
        """Cancel the task and end its process."""
        self._engine.cancel(self._reference, force=True)


def engine_of(name: str, folder: Path, options: Mapping[str, Any]) -> Begin | None:
    """Return what begins runs in an engine; None for this machine.

    Raises:
        RunError: no such engine, options for this machine, **or** what the engine refuses.
    """
    match name:
        case "slurm":
            return slurm(folder / "slurm", options)
        case "ray":
            return ray(options)
        case "local" if not options:
            return None
        case "local":
            raise RunError("--with is for --launcher slurm and ray; on this machine there is --jobs")
        case _:
            raise RunError(mistake(name, ENGINES, what="the unknown launcher"))
