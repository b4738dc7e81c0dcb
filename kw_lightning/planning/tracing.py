"""A forward pass on the meta device: the shapes that every layer sees, without weights and without memory."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.errors import first_line

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module in the forward pass: shapes with the batch dimension.

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
        failure: why the pass did not reach the network's end, None when it did. The calls before that are there only
            where values decide the way, as in a detector: meta tensors have none.
        reads: names of the modules whose `weight` something else computed with, beside or instead of calling them.
    """

    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    macs: int | None = None
    failure: str | None = None
    reads: frozenset[str] = frozenset()

    def calls_of(self, names: Sequence[str]) -> tuple[Call, ...]:
        """Return the calls of a module that has these names; empty if it was not called."""
        return next((self.calls[name] for name in names if name in self.calls), ())


def trace(model: nn.Module, input_shape: Sequence[int], *, batch: int = 1, training: bool = False) -> Trace:
    """Run samples through a network on the meta device and note the shapes.

    Args:
        model: any network; it is not changed, and a copy without its weights and hooks is run.
        input_shape: [channels, *size] of one sample.
        batch: how many samples; multiply-adds are counted for one only.
        training: run in training mode, whose norms need at least two.

    Returns:
        The trace; a network that does not run this way (unlike inputs, values that decide the way) gives one with
        `failure`. One that takes several inputs gets that many samples of the shape.
    """
    found = _trace(model, input_shape, batch, training, hooks=False)
    if found.failure is not None and not found.calls and any(_hooked(module) for module in model.modules()):
        # Some networks read what their own hooks have put aside.
        with_hooks = _trace(model, input_shape, batch, training, hooks=True)
        return with_hooks if with_hooks.calls else found
    return found


def _trace(model: nn.Module, input_shape: Sequence[int], batch: int, training: bool, hooks: bool) -> Trace:
    calls: dict[str, list[Call]] = {}
    counter = FlopCounterMode(display=False) if batch == 1 and not training else nullcontext()
    try:
        shadow = meta_copy(model, hooks=hooks).train(training)
        watch = _WeightWatch(shadow)
        # Tensors stay alive during the pass, so that an id means one tensor.
        alive: list[Tensor] = []
        with _recording(shadow, calls, alive), watch.calls(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = [torch.empty(batch, *input_shape, device="meta") for _ in range(_inputs(shadow))]
            with counter, watch:
                shadow(*samples)
    except Exception as error:  # anything that a stranger's forward pass can raise
        if _is_about_values(error) and calls:
            message = f"values decide which way the forward pass goes: {first_line(error).partition('. ')[0]}"
            seen = {name: tuple(found) for name, found in calls.items()}
            return Trace(seen, failure=message, reads=frozenset(watch.reads))
        return Trace(failure=f"the network does not run on one input of {list(input_shape)}: {first_line(error)}")
    macs = counter.get_total_flops() // 2 if isinstance(counter, FlopCounterMode) else None
    return Trace({name: tuple(found) for name, found in calls.items()}, macs, reads=frozenset(watch.reads))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _inputs(model: nn.Module) -> int:
    """Return how many inputs a network's forward pass cannot do without; at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(sum(p.kind in places and p.default is p.empty for p in parameters), 1)


def _is_about_values(error: Exception) -> bool:
    """Say whether an error comes of the numbers that meta tensors do not have."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def meta_copy(model: nn.Module, *, hooks: bool = False) -> nn.Module:
    """Return a copy of a network whose parameters and buffers are on the meta device, without its hooks unless asked.

    Tensors that a pass before has left on a module, and that are no parameters, go along.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.to("meta")
        for left in _tensors(vars(module).values()):
            if left.grad_fn is not None:  # which no copy can be made of
                memo[id(left)] = left.detach().to("meta")
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules() if not hooks else ():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    # A float16 or quantized network has no place here: shapes are the same in float32.
    return shadow.float()


@contextmanager
def _recording(model: nn.Module, calls: dict[str, list[Call]], alive: list[Tensor]) -> Iterator[None]:
    def record(name: str) -> Callable[..., None]:
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


class _WeightWatch(TorchDispatchMode):
    """Sees who computes with the weight of a module while the module itself does not run.

    Shape, type and device are no computation: what asks for them alone is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reads: set[str] = set()
        self._modules: dict[int, tuple[str, nn.Module]] = {}
        self._running: list[nn.Module] = []
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and type(weight) is nn.Parameter:
                self._modules[_storage(weight)] = (name, module)

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Know, inside this block, which modules run."""

        def enter(module: nn.Module, *_: Any) -> None:
            self._running.append(module)

        def leave(module: nn.Module, *_: Any) -> None:
            self._running.pop()

        handles: list[Any] = []
        for _, module in self._modules.values():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            name, module = self._modules.get(_storage(tensor), ("", None))
            if module is not None and module not in self._running:
                self.reads.add(name)
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """Return what tells a tensor's memory, and that of its views, from all others; 0 where it has none."""
    return tensor.untyped_storage()._cdata if type(tensor) in (Tensor, nn.Parameter) else 0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def batch_first(shape: Shape, batch_dim: int) -> Shape:
    """Return a shape with its batch as dimension 0; one sample without a batch gets one."""
    if len(shape) < batch_dim + 2:
        return (1, *shape)
    return (shape[batch_dim], *shape[:batch_dim], *shape[batch_dim + 1 :])


def positions(kernel_shape: Shape, shape: Shape) -> int:
    """Return the positions (or tokens) of a layer's input or output [batch, ...] per sample of its batch."""
    return math.prod(shape[2:]) if len(kernel_shape) > 2 else math.prod(shape[1:-1])
