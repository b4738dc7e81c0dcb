"""Dynamic layers in plain evaluation: a layer's call in C, told once and used again while nothing has changed.

With few samples, finding out what to do takes Python as long as doing it. It depends on sizes, modes, and where tensors
lie, all of which is compared at every call; what is in the tensors is not, since the call reads them where they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.engine import Epilogue, attended, evaluation, training
from kw_lightning.nn.precision import PLAIN, is_unheard

if TYPE_CHECKING:
    from kw_lightning.nn.convolutions import KWConvNd
    from kw_lightning.nn.layer import KWLayer

MOST_CALLS = 32
"""That a layer keeps: it may be called on maps of several sizes by turns."""
NORMS = (nn.BatchNorm1d, nn.LayerNorm)
PARTS = ("reduce", "norm", "expand")  # of an attention, that are plain modules


class Calls:
    """The calls of a layer, by sizes and modes; those of a copy, or of one that was pickled, are its own.

    Attributes:
        found: in evaluation, with the places that they were told.
        steps: in training.
    """

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, evaluation.Evaluation | None]] = {}
        self.steps: dict[Any, training.Step | None] = {}

    @classmethod
    def of(cls, layer: nn.Module) -> Calls:
        """Return a layer's."""
        own = vars(layer)
        if "calls" not in own:
            own["calls"] = cls()
        return own["calls"]  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: Any) -> Calls:
        return Calls()

    def __reduce__(self) -> Any:
        return Calls, ()


def find_call(layer: KWLayer, x: Tensor, epilogue: Epilogue) -> evaluation.Evaluation | None:
    """Return a layer's call for x in plain evaluation, None where there is none: where it is to do as it always does.

    Args:
        x: [batch, in_channels, *size], **or** what the layer refuses.
        epilogue: what becomes of the output, without the layer's own scale and bias.
    """
    attention = layer._modules.get("attention")
    if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    if not isinstance(attention, ContrastingAttention) or not _is_plain(attention):
        return None
    tensors = tensors_of(layer, attention, epilogue)
    places = _places(tensors)
    if places is None:
        return None
    epsilon = vars(attention._modules["norm"]).get("eps")
    key = (x.shape, x.stride(), layer.engine, layer._geometry, epsilon, _kind(epilogue), evaluation.setting())
    calls = Calls.of(layer).found
    before, call = calls.get(key, (None, None))
    if before != places:
        call = _prepare(layer, attention, x, tensors, epilogue)
        if len(calls) >= MOST_CALLS:
            calls.clear()
        calls[key] = places, call
    return call


def call_operator(layer: KWConvNd, x: Tensor, epilogue: Epilogue) -> Tensor | None:
    """Return what becomes of a layer's output, by one operator of a graph that torch.compile makes of plain evaluation.

    What is asked here is asked once, while the graph is made; so is what its guards compare at every call.

    Returns:
        None where the graph is to have several operators, **or** the layer refuses x.
    """
    attention = layer.attention
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if not isinstance(attention, ContrastingAttention) or not _is_plain(attention):
        return None
    tensors = fitting(layer, attention, x, tensors_of(layer, attention, epilogue))
    if tensors is None:
        return None
    epsilons = attention.norm.eps, 0.0 if epilogue.norm is None else epilogue.norm.epsilon
    convolution = layer._convolution()
    return attended.call(x, tensors, epilogue.added, convolution, epsilons, layer.engine, epilogue.activation)


def _is_plain(attention: ContrastingAttention) -> bool:
    """Return whether an attention is nothing but its two linear layers and the norm between, none of them trained."""
    modules = attention._modules
    parts = [modules.get(name) for name in PARTS]
    reduce, norm, last = parts
    if type(reduce) is not nn.Linear or type(norm) not in NORMS or type(last) is not nn.Linear:
        return False
    if (
        attention.training
        or getattr(norm, "training", True)
        or modules.get("basis") is not None
        or attention.gates is not None
    ):
        return False
    plain = type(attention) is ContrastingAttention and attention.function == "contrast" and not has_any_global_hook()
    return plain and all(part is not None and is_unheard(part) for part in (attention, *parts))


def _kind(epilogue: Epilogue) -> tuple[Any, ...]:
    norm, added = epilogue.norm, epilogue.added
    summand = None if added is None else (added.shape, added.stride(), added.dtype, type(added))
    return epilogue.activation, None if norm is None else norm.epsilon, summand


def tensors_of(layer: KWLayer, attention: ContrastingAttention, epilogue: Epilogue) -> list[Tensor | None]:
    """Return all tensors that a layer's output depends on, past `nn.Module.__getattr__`."""
    parts: list[Any] = [attention._modules[name] for name in PARTS]
    linear, norm, last = (part._parameters for part in parts)
    statistics, warehouse = parts[1]._buffers, layer.warehouse
    return [
        None if warehouse is None else warehouse._parameters.get("cells"),
        None if warehouse is None or not attention.annealed else warehouse._buffers.get("temperature"),
        attention._initial,
        *(linear.get("weight"), linear.get("bias")),
        *(norm.get("weight"), norm.get("bias"), statistics.get("running_mean"), statistics.get("running_var")),
        *(last.get("weight"), last.get("bias")),
        *(layer._buffers.get("output_scale"), layer._parameters.get("bias")),
        *(() if epilogue.norm is None else epilogue.norm[:4]),
    ]


def _places(tensors: list[Tensor | None]) -> list[Any] | None:
    """Return where tensors lie, and how; None where one is no plain tensor."""
    places: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            places.append(None)
        elif type(tensor) not in PLAIN:
            return None
        else:
            places.append((tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.is_contiguous()))
    return places


def _prepare(
    layer: KWLayer, attention: ContrastingAttention, x: Tensor, tensors: list[Any], epilogue: Epilogue
) -> evaluation.Evaluation | None:
    of = fitting(layer, attention, x, tensors)
    if of is None:
        return None
    epsilon = 0.0 if epilogue.norm is None else epilogue.norm.epsilon
    own = of.epilogue(epsilon, epilogue.added, epilogue.activation)
    convolution = layer._over_positions()
    cells = of.cells.view(-1, *convolution.cell_shape)
    return evaluation.prepare(x, of.attention(attention.norm.eps), cells, convolution, layer.engine, own)


def fitting(
    layer: KWLayer, attention: ContrastingAttention, x: Tensor, tensors: list[Any]
) -> evaluation.LayerTensors | None:
    """Return a layer's tensors by name, None where C does not read them as they are, or x is none of the layer's."""
    of = evaluation.LayerTensors(*tensors)
    by_sample = type(attention.norm) is nn.LayerNorm
    statistics = () if by_sample else (of.mean, of.variance)
    needed = [of.cells, of.initial, of.reduce, of.scale, of.shift, of.weight, of.bias, *statistics]
    needed += [of.temperature] if attention.annealed else []
    if not layer._takes(x) or any(tensor is None for tensor in needed) or not all(map(is_read, tensors)):
        return None
    width, columns = len(of.reduce), len(of.cells) + 1
    of_width = [of.reduce_bias, of.scale, of.shift, of.mean, of.variance]
    shapes = of.reduce.shape[1:] == x.shape[1:2] and of.weight.shape == (len(of.initial) * columns, width)
    if not shapes or of.bias.shape != of.weight.shape[:1]:
        return None
    return of if all(tensor is None or tensor.shape == (width,) for tensor in of_width) else None


def is_read(tensor: Tensor | None) -> bool:
    """Return whether C reads a tensor as it lies; β's cells are whole numbers."""
    if tensor is None:
        return True
    return tensor.dtype in (torch.float32, torch.int64) and tensor.is_cpu and tensor.is_contiguous()
