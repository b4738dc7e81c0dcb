"""A whole network: the static one, the literal form and the engine's, in training and inference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kw_lightning.bench.timing import Work, interleaved, kept_bytes, median_ratio
from kw_lightning.errors import KWError, times
from kw_lightning.nn import KWLayer
from kw_lightning.nn.engine.factors import AttentionFactors, differentiate_alpha, make_alpha
from kw_lightning.nn.finishing import add_epilogues
from kw_lightning.nn.precision import without_autocast

CPU = torch.device("cpu")
KINDS = ("static", "reference", "kw")


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often.

    Attributes:
        shape: of the input, [batch, channels, *size].
        dtype: float32 and float64 as they are; half precision by autocast.
        device: where.
        repeats: rounds that are counted.
        channels_last: memory format of input and networks.
        reference: measure the literal form too.
        compiled: the mode of torch.compile, of training and of inference each its own graph; None without.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    repeats: int = 5
    channels_last: bool = False
    reference: bool = True
    compiled: str | None = None

    def make_input(self) -> Tensor:
        """Return a random input, the same every time."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator).to(self.device, self._stored)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, type and memory format."""
        model = model.to(self.device, self._stored)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def autocast(self) -> torch.autocast:
        """Return the context in which half precision is computed."""
        return torch.autocast(self.device.type, self.dtype, enabled=self._half)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the networks that are measured."""
        return KINDS if self.reference else (KINDS[0], KINDS[2])

    @property
    def _half(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def _stored(self) -> torch.dtype:
        return torch.float32 if self._half else self.dtype


@dataclass(frozen=True)
class NetworkResult:
    """One network in one mode.

    Attributes:
        training: a forward and a backward pass; else inference.
        seconds: median of every kind measured.
        ratios: median of each round's time relative to the static network's.
        attention: of the time with warehouses, the part that computing α takes of maps that were written just before,
            median of the rounds; None of a compiled network, which may compute it with something else.
        kept: bytes kept for the backward pass, parameters left out; in training only.
        multiply_adds: of a forward pass over the batch, of the static network and with warehouses.
    """

    training: bool
    seconds: dict[str, float]
    ratios: dict[str, float]
    attention: float | None
    kept: dict[str, int]
    multiply_adds: dict[str, int]

    def gflops(self, kind: str) -> float:
        """Return the floating-point operations per second that a kind reaches; a training step counts three passes."""
        macs = self.multiply_adds.get(kind, 0)
        return 2 * macs * (3 if self.training else 1) / self.seconds[kind] / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "mode": "training" if self.training else "inference",
            "seconds": self.seconds,
            "ratio": self.ratios,
            "attention": self.attention,
            "kept_bytes": self.kept,
            "multiply_adds": self.multiply_adds,
            "gflops": {kind: self.gflops(kind) for kind in self.multiply_adds if kind in self.seconds},
        }


def check_batch_norms(model: nn.Module, setting: Setting, name: str) -> None:
    """Refuse a network that cannot train on the input, because a BatchNorm of it gets one value per channel.

    Args:
        model: a static network; dynamic layers need no statistics of the batch.
        setting: of the input.
        name: of the network, for the message.

    Raises:
        KWError: there is such a BatchNorm.
    """
    batch, *size = setting.shape
    if batch > 1:  # every channel has as many values as the batch has samples, at least
        return

    def refuse(norm: nn.Module, x: Tensor, norm_name: str) -> None:
        # A frozen norm, which stays out of training mode, takes its running statistics.
        if norm.training and x.numel() == x.shape[1]:
            raise KWError(
                f'"{name}" cannot train on batch {batch} of {times(size)}: the BatchNorm "{norm_name}" '
                "gets one value per channel, which has no variance; give a larger --batch or --size"
            )

    handles = [
        module.register_forward_pre_hook(lambda norm, x, norm_name=norm_name: refuse(norm, x[0], norm_name))
        for norm_name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        with torch.no_grad(), setting.autocast():
            setting.place(model).train()(setting.make_input())
    finally:
        for handle in handles:
            handle.remove()


def bench_network(
    static: nn.Module, kw: nn.Module, setting: Setting, multiply_adds: Sequence[int] = ()
) -> list[NetworkResult]:
    """Measure training and inference, the networks taking turns.

    Args:
        static: the static network.
        kw: the network with warehouses; its layers' engines are changed while the literal form is measured. In
            inference they do what comes after them, as in `kw predict`.
        setting: what, where and how often.
        multiply_adds: of one sample: of the static network and with warehouses, if known.
    """
    static, kw = setting.place(static), setting.place(kw)
    add_epilogues(kw)
    x = setting.make_input()
    counted = dict(zip(("static", "kw"), (macs * setting.shape[0] for macs in multiply_adds), strict=False))
    results = []
    for training in (True, False):
        runs = {kind: _Run(static if kind == "static" else kw, kind, setting, x, training) for kind in setting.kinds}
        works = {kind: run.step for kind, run in runs.items()}
        if setting.compiled is None:
            works |= runs["kw"].record_attention()
        seconds = interleaved(works, setting.device, setting.repeats)
        kept = {kind: kept_bytes(run.forward, run.model.parameters()) for kind, run in runs.items()} if training else {}
        results.append(
            NetworkResult(
                training,
                {kind: statistics.median(seconds[kind]) for kind in runs},
                {kind: median_ratio(seconds, kind, "static") for kind in runs},
                _attention_share(seconds) if setting.compiled is None else None,
                kept,
                counted,
            )
        )
    return results


class _Run:
    """One network, ready to be timed in a mode, in which it is until another run is made of it."""

    def __init__(self, model: nn.Module, kind: str, setting: Setting, x: Tensor, training: bool) -> None:
        self.model, self.kind, self.setting, self.x, self.training = model, kind, setting, x, training
        self.network: Callable[[Tensor], Tensor] = model
        if setting.compiled is not None:
            self.network = torch.compile(model, dynamic=False, mode=setting.compiled)
        self.layers = [layer for layer in model.modules() if isinstance(layer, KWLayer)]
        self.step: Work = self._train if training else self._infer
        # Here alone: telling every module takes longer than a small one computes, and a layer has several.
        model.train(training)

    def forward(self) -> Tensor:
        with self._by_engine(), self.setting.autocast():
            y = self.network(self.x)
        return y.float().square().mean()

    @contextmanager
    def _by_engine(self) -> Iterator[None]:
        """Within the context, let the layers take the literal form where that is measured."""
        engines = [(layer, layer.engine) for layer in self.layers if self.kind == "reference"]
        try:
            for layer, _ in engines:
                layer.engine = "reference"
            yield
        finally:
            for layer, engine in engines:
                layer.engine = engine

    def record_attention(self) -> dict[str, Work]:
        """Return the works of writing what each layer gets of the input, and of that and its attention alone.

        In the network a map has just been written when an attention reads it, and its gradient when the attention adds
        to that; so the attention takes the difference. Where it is a part of a layer's one call, that is made in both.
        """
        inputs: list[tuple[KWLayer, Tensor]] = []
        handles = [
            layer.register_forward_pre_hook(lambda layer, x: inputs.append((layer, x[0].detach())))
            for layer in self.layers
        ]
        try:
            with torch.no_grad():
                self.forward()
        finally:
            for handle in handles:
                handle.remove()
        # Finding a layer's whole call is no part of the attention.
        with self.setting.autocast(), torch.inference_mode(not self.training):
            calls = [layer.call(layer.as_map(x)) for layer, x in inputs]
        read = [layer.as_map(x) if call else x for (layer, x), call in zip(inputs, calls, strict=True)]
        for x in read if self.training else ():
            x.grad = torch.zeros_like(x)

        def work(*, attend: bool) -> None:
            with self.setting.autocast(), torch.inference_mode(not self.training):
                for (layer, _), x, call in zip(inputs, read, calls, strict=True):
                    _write_anew(x)
                    if call is not None:
                        call.attend(x, alone=not attend)
                    elif attend:
                        _attend(layer, x.requires_grad_(self.training))

        return {"written": partial(work, attend=False), "attended": partial(work, attend=True)}

    def _train(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()

    def _infer(self) -> None:
        with torch.inference_mode():
            self.forward()


def _attention_share(times: Mapping[str, Sequence[float]]) -> float:
    """Return the part of the time with warehouses that computing α takes, median of the rounds."""
    rounds = zip(times["attended"], times["written"], times["kw"], strict=True)
    return statistics.median((attended - written) / whole for attended, written, whole in rounds)


def _write_anew(x: Tensor) -> None:
    """Write a map, and its gradient where it has one."""
    for tensor in (x.detach(), x.grad):
        if tensor is not None:
            tensor.neg_()


def _attend(layer: KWLayer, x: Tensor) -> None:
    """Make α of x as the layer and its operator do, and in training the gradients, of which x's is added in place."""
    _, weights, _ = layer._attend(x)
    if not isinstance(weights, AttentionFactors):
        if weights.requires_grad:
            weights.backward(torch.ones_like(weights))
        return
    with torch.no_grad(), without_autocast(x.device):
        alpha = make_alpha(weights)
        if weights.hidden.requires_grad:
            alpha = make_alpha(weights)  # anew, for the backward pass
            gradients = differentiate_alpha(weights, torch.ones_like(alpha))
    if weights.hidden.requires_grad:
        weights.hidden.backward(gradients.hidden)
