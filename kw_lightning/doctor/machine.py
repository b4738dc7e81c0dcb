"""What training depends on here: versions, devices, the compiler, the compiled passes, and where they are kept."""

from __future__ import annotations

import json

import torch

from kw_lightning.bench.machine import processor
from kw_lightning.doctor.findings import Finding
from kw_lightning.fit.folder import versions
from kw_lightning.nn.engine import cache, native
from kw_lightning.nn.engine.cache import CacheError


def examine_machine() -> list[Finding]:
    """Look at this machine; the passes are compiled for it if need be."""
    here = json.loads(versions())
    here.pop("compiled_passes")
    return [*(Finding(name, version) for name, version in here.items()), *_devices(), *_compiled(), _cache()]


def _devices() -> list[Finding]:
    cpu = torch.device("cpu")
    found = [Finding("cpu", f"{processor(cpu)}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "available"))
    return found


def _compiled() -> list[Finding]:
    try:
        command, version = native.find_compiler()
        compiler = Finding("compiler", f"{' '.join(command)}: {version.partition(chr(10))[0]}")
    except native.LibraryError as error:
        compiler = Finding("compiler", str(error), amiss=True)
    status = native.status()
    return [compiler, Finding("compiled passes", str(status), amiss=status.library is None)]


def _cache() -> Finding:
    try:
        folder = cache.open_cache()
    except CacheError as error:
        return Finding("cache folder", str(error), amiss=True)
    files = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
    return Finding("cache folder", f"{folder}, {len(files)} files, {sum(files) / 1e6:.1f} MB")
