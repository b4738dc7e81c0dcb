"""Times the paths on this machine, once for every shape; kept in memory and in a file of the user's cache folder."""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor

from kw_lightning.nn.clock import elapsed
from kw_lightning.nn.engine import cache, computing
from kw_lightning.nn.engine.cache import CacheError
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.paths import Path, find_path
from kw_lightning.nn.engine.problem import Problem

REPEATS = 3
SLOWEST = 4  # a path this many times slower than the best so far is not timed again

_logger = logging.getLogger(__name__)
_memory: dict[str, str] = {}


def fastest(
    candidates: Sequence[Path],
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    *,
    backward: bool,
) -> Path:
    """Return the candidate that is fastest for these tensors, timed the first time that their shapes are met.

    Args:
        candidates: paths, the one expected to be fastest first.
        x, attention, cells, convolution: as in `computing.forward`.
        backward: time the backward pass instead of the forward pass.
    """
    key = _key(Problem.of(x, attention, cells, convolution, backward=backward), x, cells)
    if not _memory:
        _memory.update(_read())
    known = find_path(_memory.get(key, ""))
    if known is None or known not in candidates:
        known = _time(candidates, x, attention, cells, convolution, backward)
        _memory[key] = known.name
        _write({**_read(), key: known.name})
    return known


def cache_file() -> FilePath:
    """Return the file of this machine's choices: `$XDG_CACHE_HOME/kw_lightning/autotune-….json`.

    Raises:
        CacheError: there is no home folder, **or** its cache can be written by others.
    """
    return cache.open_cache() / f"autotune-{platform.node() or 'machine'}.json"


def _key(problem: Problem, x: Tensor, cells: Tensor) -> str:
    threads = torch.get_num_threads() if x.device.type == "cpu" else _device_name(x.device)
    layout = "last" if x.dim() > 2 and x.stride(1) == 1 else "first"
    of_factors = () if problem.width is None else (f"width {problem.width}", *["kept"] * problem.kept)
    parts = (
        torch.__version__,
        x.device.type,
        threads,
        x.dtype,
        layout,
        tuple(x.shape),
        tuple(cells.shape),
        *of_factors,
        problem.convolution,
    )
    return f"{'backward' if problem.backward else 'forward'} " + " ".join(str(part) for part in parts)


@functools.lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _time(
    candidates: Sequence[Path],
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    backward: bool,
) -> Path:
    gradient = torch.ones_like(empty_output(x, convolution))

    def work(path: Path) -> Callable[[], object]:
        if backward:
            return lambda: computing.backward(gradient, x, attention, cells, convolution, path, [True] * 3)
        return lambda: computing.forward(x, attention, cells, convolution, path)

    times: dict[Path, float] = {}
    for repeat in range(REPEATS + 1):  # the first one warms up
        for path in candidates:
            if path in times and times[path] > SLOWEST * min(times.values()):
                continue
            seconds = elapsed(work(path), x.device)
            times[path] = seconds if repeat < 2 else min(seconds, times[path])
    return min(times, key=lambda path: times[path])


def _read() -> dict[str, str]:
    try:
        data = json.loads(cache.read(cache_file()) or b"{}")
    except CacheError as error:
        _tell(str(error))
        return {}
    except (ValueError, RecursionError):  # damaged
        return {}
    choices = data.items() if isinstance(data, dict) else ()
    return {key: path for key, path in choices if isinstance(path, str) and find_path(path) is not None}


def _write(choices: dict[str, str]) -> None:
    try:
        cache.write(cache_file(), json.dumps(choices, indent=1, sort_keys=True).encode())
    except CacheError as error:
        _tell(str(error))


@functools.lru_cache(maxsize=16)
def _tell(reason: str) -> None:
    """Warn once that earlier timings are not read, or that new ones are not kept."""
    _logger.warning("%s: autotune times anew what it has timed before", reason)
