"""Real processes that ask for the compiled passes, each with its own environment: they start with PyTorch loaded."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pwd
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120

# Notes its calls, and compiles fast what need not run fast, each of the engine's files once for all tests of a folder.
COMPILER = """#!/bin/sh
echo "$*" >> {calls}
for word; do
    case "$word" in */native/*.c) source=$word ;; esac
    [ "$before" = -o ] && made=$word
    before=$word
done
[ -n "$source" ] || exec {compiler} "$@" -O0
kept={kept}/$(basename "$source").o
[ -e "$kept" ] || {{ {compiler} "$@" -O0 && cp "$made" "$kept.$$" && mv "$kept.$$" "$kept"; }} && cp "$kept" "$made"
"""


@dataclass(frozen=True)
class Asked:
    """What became of a process: its exit code, whether the passes are in use there, and what it wrote to stderr."""

    code: int | None
    answer: str
    lines: list[str]


def ask(environment: dict[str, str | None], folder: Path, before: Callable[[], None] | None = None) -> Asked:
    """Ask for the passes in a process of its own, after `before()`; None takes a variable away."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kw_lightning.nn.engine.native"])
    answer, errors = folder / "answer", folder / "errors"
    answer.unlink(missing_ok=True)
    process = context.Process(target=_answer, args=(environment, answer, errors, before))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    return Asked(process.exitcode, answer.read_text() if answer.exists() else "", errors.read_text().splitlines())


def _answer(environment: dict[str, str | None], answer: Path, errors: Path, before: Callable[[], None] | None) -> None:
    from kw_lightning.nn.engine import native

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if before is not None:
        before()
    answer.write_text(f"{native.available()} {native.status()}")


def program(file: Path, text: str) -> Path:
    """Return a file that can be run."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def compilations(folder: Path) -> int:
    """Return how often the library was compiled by `COMPILER`, whose calls are noted in this folder."""
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return sum("/mix_kernels.c -o" in call for call in calls)


def hostile_library(folder: Path, mark: Path) -> bytes:
    """Return a library that writes the file `mark` when it is loaded."""
    source = folder / "hostile.c"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) static void run(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    built = folder / "hostile.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    return built.read_bytes()


def fill_disk() -> None:
    """Leave no room on any disk for what has to be written through."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def lose_name() -> None:
    """Run as a user of whom the system knows nothing."""

    def getpwuid(_: int) -> None:
        raise KeyError("no such user")

    pwd.getpwuid = getpwuid


def ask_in_threads() -> None:
    """Ask for the passes in several threads at once."""
    from kw_lightning.nn.engine.native import available

    threads = [threading.Thread(target=available) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
