"""A forward pass on the meta device: the shapes that every layer sees, without weights and without memory."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.errors import first_line

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module in the forward pass of a single sample: shapes with the batch dimension.

    Attributes:
        inputs: shape of the first input.
        outputs: shape of the output.
        input_id: identity of the input tensor during the pass; equal for layers that read the same tensor.
    """

    inputs: Shape
    outputs: Shape
    input_id: int


@dataclass(frozen=True)
class Trace:
    """What a forward pass on the meta device showed.

    Attributes:
        calls: module name → its calls in order; modules that were not called are not in it.
        macs: multiply-adds of the whole network for one sample, as torch's FlopCounterMode counts them: convolutions,
            linear layers and products of activations (self-attention); norms and activations are not counted.
        failure: why there is nothing here, None when there is.
    """

    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    macs: int | None = None
    failure: str | None = None

    def calls_of(self, names: Sequence[str]) -> tuple[Call, ...]:
        """Return the calls of a module that has these names; empty if it was not called."""
        return next((self.calls[name] for name in names if name in self.calls), ())


def trace(model: nn.Module, input_shape: Sequence[int], *, training: bool = False) -> Trace:
    """Run one sample through a network on the meta device and note the shapes.

    Args:
        model: any network; it is not changed, and a copy without its weights and hooks is run.
        input_shape: [channels, *size] of one sample.
        training: run in training mode, with a batch of two for the norms; no multiply-adds then.

    Returns:
        The trace; a network that does not run this way (several inputs, a detector, values that decide the way) gives
        one with `failure`.
    """
    batch = 2 if training else 1
    calls: dict[str, list[Call]] = {}
    try:
        shadow = meta_copy(model).train(training)
        # Tensors stay alive during the pass, so that an id means one tensor.
        alive: list[Tensor] = []
        with _recording(shadow, calls, alive), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.empty(batch, *input_shape, device="meta")
            if training:
                shadow(x)
                macs = None
            else:
                with FlopCounterMode(display=False) as counter:
                    shadow(x)
                macs = counter.get_total_flops() // 2
    except Exception as error:  # anything that a stranger's forward pass can raise
        return Trace(failure=f"the network does not run on one input of {list(input_shape)}: {first_line(error)}")
    return Trace({name: tuple(found) for name, found in calls.items()}, macs)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers are on the meta device, without its hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.to("meta")
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    # A float16 or quantized network has no place here: shapes are the same in float32.
    return shadow.float()


@contextmanager
def _recording(model: nn.Module, calls: dict[str, list[Call]], alive: list[Tensor]) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next(_tensors((*args, *kwargs.values())), None)
            y = next(_tensors((output,)), None)
            if x is not None and y is not None:
                alive.append(x)
                calls.setdefault(name, []).append(Call(tuple(x.shape), tuple(y.shape), id(x)))

        return hook

    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def positions(kernel_shape: Shape, shape: Shape) -> int:
    """Return the positions (or tokens) of a layer's input or output [batch, ...] per sample of its batch."""
    return math.prod(shape[2:]) if len(kernel_shape) > 2 else math.prod(shape[1:-1])
