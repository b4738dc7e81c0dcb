"""The C library of this folder: compiled once per machine, when the first layer runs, by the machine's own compiler.

It computes in single precision on a CPU. Without a compiler, or with `KW_NATIVE=0`, the engine uses the paths made of
PyTorch's products, and warns once. The library shares PyTorch's pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from kw_lightning.errors import printable
from kw_lightning.nn.engine import cache
from kw_lightning.nn.engine.cache import CacheError
from kw_lightning.nn.engine.native import layout

SOURCES = (
    "tiles.h",
    "winograd.h",
    "epilogue.h",
    "pass.h",
    "runs.h",
    "folds.h",
    "layout.c",
    "mix_kernels.c",
    "mix_lines.c",
    "mix_lines_backward.c",
    "mix_rows.c",
    "mix_rows_backward.c",
    "mix_inputs.c",
    "planes.h",
    "mix_depthwise.c",
    "products.c",
    "attention.h",
    "attention.c",
    "evaluation.h",
    "evaluation.c",
    "training.h",
    "training.c",
)
FUNCTIONS = (
    "kw_lanes",
    "kw_rows",
    "kw_mix_kernels_memory",
    "kw_mix_lines_memory",
    "kw_mix_lines_backward_memory",
    "kw_mix_rows_memory",
    "kw_mix_rows_backward_memory",
    "kw_mix_inputs_memory",
    "kw_mix_inputs_backward_memory",
    "kw_mix_depthwise_memory",
    "kw_weigh_memory",
    "kw_evaluate_memory",
    "kw_kept_memory",
    "kw_train_memory",
    "kw_train_backward_memory",
)
PASSES = (
    "kw_mix_kernels",
    "kw_mix_lines",
    "kw_mix_lines_backward",
    "kw_mix_rows",
    "kw_mix_rows_backward",
    "kw_mix_inputs",
    "kw_mix_inputs_backward",
    "kw_mix_depthwise",
    "kw_hidden",
    "kw_hidden_backward",
    "kw_weigh",
    "kw_weigh_backward",
    "kw_evaluate",
    "kw_train",
    "kw_train_backward",
    "kw_row_products",
)
# The loops of products fit in two lines of decoded instructions; spread over three they took up to 10 % more time.
FLAGS = ("-O3", "-fPIC", "-fopenmp", "-falign-loops=64")
# The options for this processor: which of the two exists depends on the machine, and some compilers have neither.
PROCESSORS = (("-march=native",), ("-mcpu=native",), ())
SWITCH = "KW_NATIVE"
COMPILERS = ("cc", "gcc", "clang")
# PyTorch has loaded an OpenMP already; not linking another shares its threads. The second is for a PyTorch that hides
# its own.
LINKS = ((), ("-fopenmp",))

_logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Status:
    """Whether the compiled passes are in use in this process.

    Attributes:
        library: the opened library, None if there is none.
        reason: why there is none.
        compiler: the first line of its `--version`.
    """

    library: ctypes.CDLL | None
    reason: str = ""
    compiler: str = ""

    def __str__(self) -> str:
        return f"not in use: {self.reason}" if self.library is None else f"in use, compiled by {self.compiler}"


class LibraryError(Exception):
    """Why there is no library; one line."""


def library() -> ctypes.CDLL | None:
    """Return the library, compiled if need be; None if that fails or is switched off."""
    return status().library


def status() -> Status:
    """Return the library, compiled if need be, or why there is none."""
    with _one_at_a_time:
        return find()


def find_compiler() -> tuple[list[str], str]:
    """Return the command of a compiler, `$CC` or the first that is found, and the output of its `--version`.

    Raises:
        LibraryError: there is none, **or** it does not run.
    """
    named = os.environ.get("CC", "")
    try:
        command = shlex.split(named)
    except ValueError as error:
        _tell(f"CC={named} is no command ({error}): another compiler is looked for")
        command = []
    for candidate in (command, *([name] for name in COMPILERS)):
        if candidate and shutil.which(candidate[0]):
            return candidate, _run([*candidate, "--version"], 60).strip()
    raise LibraryError(f"no C compiler found ($CC, {', '.join(COMPILERS)})")


@functools.cache
def find() -> Status:
    """Look for the library, once per process; warn if there is none."""
    try:
        return _find()
    except (LibraryError, CacheError, OSError) as error:
        reason = " ".join(str(error).split())
    _tell(f"the compiled passes are not in use: {reason}; dynamic layers on a CPU take PyTorch's slower products")
    return Status(None, reason)


def _find() -> Status:
    if os.environ.get(SWITCH) == "0":
        raise LibraryError(f"{SWITCH}=0 is set")
    if os.name != "posix":
        raise LibraryError(f"they are not compiled on {platform.system()}")
    compiler, version = find_compiler()
    with as_file(files(__package__)) as sources:
        name = f"engine-{_fingerprint(sources, compiler, version)}.so"
        try:
            target = cache.open_cache() / name
        except CacheError as error:
            _tell(f"{error}: nothing is kept there, and the passes are compiled for this process alone")
            target = None
        loaded = _load(sources, compiler, name, target)
    return Status(loaded, compiler=version.partition("\n")[0])


def _load(sources: Path, compiler: list[str], name: str, target: Path | None) -> ctypes.CDLL:
    """Return the library that is kept in the file `target`, else one that is compiled, and kept there where it can be.

    It is opened where it is kept or from a folder of this process alone: either may forbid it.
    """
    kept = None
    try:
        kept = target and cache.read_checked(target)
    except CacheError as error:
        _tell(f"{error}; the passes are compiled anew")
    if target and kept:
        try:
            return _open(target)
        except LibraryError:
            pass
    with tempfile.TemporaryDirectory() as place:
        if kept:
            copy = Path(place) / name
            copy.write_bytes(kept)
            try:
                return _open(copy)
            except LibraryError:  # made for a PyTorch with another OpenMP
                pass
        return _build(sources, compiler, Path(place), target)


def _build(sources: Path, compiler: list[str], place: Path, target: Path | None) -> ctypes.CDLL:
    """Compile in the folder `place`, and link in the first way that makes a library which can be opened."""
    processor = _find_processor(compiler, place)
    objects = {sources / source: place / f"{source}.o" for source in SOURCES if source.endswith(".c")}

    def compile_file(source: Path) -> None:
        _run([*compiler, *processor, *FLAGS, "-c", str(source), "-o", str(objects[source])], 300, place)

    with ThreadPoolExecutor() as pool:  # in parallel: a user is waiting for the first step
        list(pool.map(compile_file, objects))
    failure = None
    for number, link in enumerate(LINKS):
        built = place / f"linked-{number}.so"
        _run([*compiler, "-shared", *map(str, objects.values()), *link, "-o", str(built)], 300, place)
        for file in (_keep(built, target), built):
            try:
                if file is not None:
                    return _open(file)
            except LibraryError as error:
                failure = error
    if target is not None:
        cache.discard(target)
    raise failure or LibraryError("it was not linked")


def _find_processor(compiler: list[str], place: Path) -> tuple[str, ...]:
    """Return the first of `PROCESSORS` with which the compiler compiles."""
    empty, made = place / "empty.c", place / "empty.o"
    empty.touch()
    for processor in PROCESSORS[:-1]:
        try:
            _run([*compiler, *processor, *FLAGS, "-c", str(empty), "-o", str(made)], 60, place)
        except LibraryError:
            continue
        return processor
    return PROCESSORS[-1]


def _keep(built: Path, target: Path | None) -> Path | None:
    """Keep a library for the next process; return where, None where it cannot be."""
    if not built.is_file():
        raise LibraryError("the compiler made no library")
    if target is None:
        return None
    try:
        cache.write_checked(target, built.read_bytes())
    except CacheError as error:
        _tell(f"{error}: the compiled passes are not kept, and every process compiles them")
        cache.discard(target)
        return None
    return target


def _open(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        for function in FUNCTIONS:
            getattr(loaded, function).restype = ctypes.c_int64
        loaded.kw_rows.argtypes = (ctypes.c_int64,)
        for function in PASSES:
            getattr(loaded, function).restype = None
        loaded.kw_evaluate.argtypes = (ctypes.c_void_p,) * 5
        place, count = ctypes.c_void_p, ctypes.c_int64
        loaded.kw_row_products.argtypes = (place, count, count, place, place, count)
        fault = layout.difference(loaded)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"the library cannot be opened: {error}") from error
    if fault is not None:
        raise LibraryError(f"the library takes its arguments otherwise: {fault}")
    return loaded


def _fingerprint(sources: Path, compiler: list[str], version: str) -> str:
    """Return what a build depends on, hashed, the processor included: machines may share a home folder."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((sources / source).read_bytes())
    digest.update(repr((version, compiler, FLAGS, PROCESSORS, LINKS, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: Sequence[str], seconds: float, place: Path | None = None) -> str:
    """Run a command of the compiler, with its temporary files in the folder `place`, and return what it prints."""
    environment = {**os.environ, "LC_ALL": "C", **({} if place is None else {"TMPDIR": str(place)})}
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, env=environment
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LibraryError(f"{shlex.join(command[:1])} does not run: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        line = next((line for line in said if "error" in line), said[0] if said else f"exit code {done.returncode}")
        raise LibraryError(f"{shlex.join(command[:1])} failed: {line.strip()[:300]}")
    return done.stdout


def _tell(message: str) -> None:
    # Once per machine, not by each of the processes that train together.
    level = logging.INFO if os.environ.get("LOCAL_RANK", "0") != "0" else logging.WARNING
    _logger.log(level, "%s", printable(message))
