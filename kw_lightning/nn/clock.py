"""The clock by which paths are chosen and benchmarks are measured: one for both, so that they mean the same time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """Return what replays a function's work on the current GPU as one CUDA graph, which waits for no CPU."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what is made ready by a first call is no part of the graph
        function()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
