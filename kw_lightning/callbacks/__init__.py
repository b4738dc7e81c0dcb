"""What goes into a Trainer: conversion, temperature, attention statistics, exact resume, sharding."""

from kw_lightning.callbacks.attention import AttentionStatistics
from kw_lightning.callbacks.attention_metric import AttentionMetric, AttentionSummary
from kw_lightning.callbacks.callback import KWCallback
from kw_lightning.callbacks.checkpoint import load_from_checkpoint
from kw_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from kw_lightning.callbacks.exact_checkpoint import ExactCheckpoint
from kw_lightning.callbacks.finite import FiniteLoss, NonFiniteError
from kw_lightning.callbacks.heat_map import heat_map
from kw_lightning.callbacks.resume import RandomState, ResumableDataLoader, RunningMetrics
from kw_lightning.callbacks.signals import InterruptedRunError
from kw_lightning.callbacks.strategies import kw_fully_shard
from kw_lightning.callbacks.temperature import TemperatureAnnealing, temperature_at

__all__ = [
    "AtomicCheckpointIO",
    "AttentionMetric",
    "AttentionStatistics",
    "AttentionSummary",
    "ExactCheckpoint",
    "FiniteLoss",
    "InterruptedRunError",
    "KWCallback",
    "NonFiniteError",
    "RandomState",
    "ResumableDataLoader",
    "RunningMetrics",
    "TemperatureAnnealing",
    "heat_map",
    "kw_fully_shard",
    "load_from_checkpoint",
    "temperature_at",
]
