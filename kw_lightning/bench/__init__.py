"""Measuring networks with warehouses beside the static network and the literal form."""

from __future__ import annotations

from kw_lightning.bench.layers import LayerResult, bench_layers
from kw_lightning.bench.machine import Machine, describe_machine
from kw_lightning.bench.networks import NetworkResult, Setting, bench_network

__all__ = [
    "LayerResult",
    "Machine",
    "NetworkResult",
    "Setting",
    "bench_layers",
    "bench_network",
    "describe_machine",
]
