"""The C library of this folder: compiled once a machine, when the first layer runs, by the machine's own compiler.

It is for single precision on a CPU. Where no compiler is found, or `KW_NATIVE=0` is set, the engine goes on with the
paths made of PyTorch's products. The library uses the pool of threads that PyTorch uses.
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
from importlib.resources import as_file, files
from pathlib import Path

SOURCES = ("tiles.h", "pass.h", "mix_kernels.c", "mix_inputs.c", "mix_depthwise.c")
FUNCTIONS = (
    "kw_lanes",
    "kw_rows",
    "kw_mix_kernels_memory",
    "kw_mix_inputs_memory",
    "kw_mix_inputs_backward_memory",
    "kw_mix_depthwise_memory",
)
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
SWITCH = "KW_NATIVE"
# PyTorch has loaded an OpenMP already: left to it, the library's threads are the same. The second is for a PyTorch
# that keeps its OpenMP to itself.
LINKS = ((), ("-fopenmp",))

_logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, compiled if need be; None where there is none to be had."""
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    compiler = _compiler()
    if compiler is None:
        _logger.info("no C compiler found: dynamic layers on the CPU use PyTorch's own products")
        return None
    for link in LINKS:
        try:
            return _load(compiler, link)
        except (OSError, subprocess.SubprocessError) as error:
            _logger.info("the compiled engine is not used: %s", error)
    return None


def cache_folder() -> Path:
    """Return the folder of what is compiled and measured on this machine: `$XDG_CACHE_HOME/kw_lightning`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kw_lightning"


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    return None


def _load(compiler: list[str], link: tuple[str, ...]) -> ctypes.CDLL:
    with as_file(files(__package__)) as folder:
        name = f"engine-{_fingerprint(folder, compiler, link)}.so"
        try:
            return _open(_compile(folder, compiler, link, cache_folder(), name))
        except OSError:  # a cache that cannot be written, or holds half a file
            with tempfile.TemporaryDirectory() as place:
                return _open(_compile(folder, compiler, link, Path(place), name))


def _fingerprint(folder: Path, compiler: list[str], link: tuple[str, ...]) -> str:
    """Return what tells one build from another: homes are shared by machines of different processors."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((folder / source).read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    digest.update(version + repr((compiler, FLAGS, link, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(folder: Path, compiler: list[str], link: tuple[str, ...], place: Path, name: str) -> Path:
    """Return the compiled library in the folder `place`; put there as a whole, as other processes may do the same."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = place / name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=place) as work:
        sources = [str(folder / source) for source in SOURCES if source.endswith(".c")]
        objects = [str(Path(work) / f"{Path(source).stem}.o") for source in sources]
        for source, compiled in zip(sources, objects, strict=True):
            _run([*compiler, *FLAGS, "-c", source, "-o", compiled])
        built = Path(work) / name
        _run([*compiler, "-shared", *objects, *link, "-o", str(built)])
        os.replace(built, target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    for function in FUNCTIONS:
        getattr(loaded, function).restype = ctypes.c_int64
    return loaded
