"""Latency of exported files in their runtimes, beside the networks that they were made from in PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.bench.timing import Work, interleaved, median_ratio
from kw_lightning.builder import apply_plan, make_static
from kw_lightning.errors import KWError, first_line, mistake
from kw_lightning.export import is_dynamic, read_onnx, read_openvino
from kw_lightning.inference import SavedNetwork
from kw_lightning.nn import set_temperature
from kw_lightning.planning import plan

STATIC, DYNAMIC = "PyTorch, static", "PyTorch, this engine"
ONNX, OPENVINO = "onnxruntime", "OpenVINO"
READERS = {".onnx": (ONNX, read_onnx), ".xml": (OPENVINO, read_openvino)}


@dataclass(frozen=True)
class Latency:
    """How long one runtime takes for a batch.

    Attributes:
        name: of the runtime, and of the file where it reads one.
        seconds: median of the rounds.
        ratio: median of each round's time relative to the static network's in PyTorch.
    """

    name: str
    seconds: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {"name": self.name, "seconds": self.seconds, "ratio": self.ratio}


def bench_exported(
    files: Sequence[Path], *, batch: int = 16, size: int | None = None, repeats: int = 5
) -> tuple[tuple[int, ...], list[Latency]]:
    """Measure inference on the CPU, all taking turns, on as many threads as torch uses.

    The networks in PyTorch are made from the recipe in the first file, with fresh weights, which no time depends on.

    Args:
        files: ONNX and OpenVINO files of `kw export`, of one network.
        batch: samples of a batch.
        size: of every spatial dimension of the input; None takes the network's usual.
        repeats: rounds that are counted.

    Returns:
        The shape of the input, and a latency for each network and file.

    Raises:
        KWError: a file of another kind, one that cannot be read, **or** an input that one of them does not take.
    """
    read: dict[str, SavedNetwork] = {}
    for file in files:
        if file.suffix.lower() not in READERS:
            raise KWError(f"{file}: {mistake(file.suffix, READERS, what='a file that ends in')}")
        runtime, reader = READERS[file.suffix.lower()]
        read[f"{runtime}, {file.name}"] = reader(file, threads=torch.get_num_threads())
    recipe = next(iter(read.values())).recipe
    planned = plan(recipe)
    if planned.input_shape is None:
        raise KWError(f'the input of "{recipe.name}" is not known')
    shape = planned.input_shape if size is None else (planned.input_shape[0], *[size] * (len(planned.input_shape) - 1))
    networks: dict[str, nn.Module] = {STATIC: make_static(recipe)}
    dynamic = apply_plan(planned, make_static(recipe)).model
    if is_dynamic(dynamic):
        set_temperature(dynamic, 0.0)
        networks[DYNAMIC] = dynamic
    networks |= {name: saved.network for name, saved in read.items()}
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    works = {name: _inference(name, network.eval(), x) for name, network in networks.items()}
    times = interleaved(works, torch.device("cpu"), repeats)
    found = [Latency(name, statistics.median(times[name]), median_ratio(times, name, STATIC)) for name in networks]
    return tuple(x.shape), found


def _inference(name: str, network: nn.Module, x: Tensor) -> Work:
    """Return the work of one batch, which was tried once."""

    def work() -> None:
        with torch.inference_mode():
            network(x)

    try:
        work()
    except Exception as error:  # every runtime has errors of its own
        raise KWError(f"{name} does not take {list(x.shape)}: {first_line(error)}") from error
    return work
