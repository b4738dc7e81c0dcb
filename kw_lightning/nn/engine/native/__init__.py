"""The engine in C, for single precision on a CPU: kernels are mixed in the cache and never written to memory."""

from __future__ import annotations

from kw_lightning.nn.engine.native.attention import (
    GIVEN,
    OF_BATCH,
    OF_SAMPLE,
    Activated,
    activate,
    add_up,
    differentiate_activations,
    differentiate_weights,
    weigh,
    weighs,
)
from kw_lightning.nn.engine.native.blocking import depths_of_bases, mixes_few
from kw_lightning.nn.engine.native.calls import (
    Kept,
    available,
    backward,
    backward_by_bases,
    forward,
    forward_by_bases,
)
from kw_lightning.nn.engine.native.evaluation import AttentionTensors, Evaluation, prepare_evaluation
from kw_lightning.nn.engine.native.forms import (
    DEPTHWISE,
    MIX_BASES,
    MIX_INPUTS,
    MIX_KERNELS,
    MIX_LINES,
    MIX_ROWS,
    WINOGRAD,
    WINOGRAD_BASES,
    Form,
    lanes,
    live,
)
from kw_lightning.nn.engine.native.library import LibraryError, Status, find_compiler, status
from kw_lightning.nn.engine.native.positions import allows_winograd
from kw_lightning.nn.engine.native.products import row_products
from kw_lightning.nn.engine.native.training import Given, Learnt, Step, prepare_step

__all__ = [
    "DEPTHWISE",
    "GIVEN",
    "MIX_BASES",
    "MIX_INPUTS",
    "MIX_KERNELS",
    "MIX_LINES",
    "MIX_ROWS",
    "OF_BATCH",
    "OF_SAMPLE",
    "WINOGRAD",
    "WINOGRAD_BASES",
    "Activated",
    "AttentionTensors",
    "Evaluation",
    "Form",
    "Given",
    "Kept",
    "Learnt",
    "LibraryError",
    "Status",
    "Step",
    "activate",
    "add_up",
    "allows_winograd",
    "available",
    "backward",
    "backward_by_bases",
    "depths_of_bases",
    "differentiate_activations",
    "differentiate_weights",
    "find_compiler",
    "forward",
    "forward_by_bases",
    "lanes",
    "live",
    "mixes_few",
    "prepare_evaluation",
    "prepare_step",
    "row_products",
    "status",
    "weigh",
    "weighs",
]
