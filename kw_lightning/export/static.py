"""A dynamic network folded into a static one: every layer's attention is held at its mean over a calibration set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.errors import KWError, listed
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.nn import KWLayer, KWLinear
from kw_lightning.nn.adapter import Adapted
from kw_lightning.nn.gates import OPEN, Factors
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.nn.weight import over_rows
from kw_lightning.recipe import load_recipe

STATIC: Mapping[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Number of spatial dimensions → torch's own layer."""
DYNAMIC_KEYS = ("warehouses", "stages", "defaults", "temperature", "engine", "epilogue")
"""Keys of a recipe that a static network does not have."""


def fold(saved: SavedNetwork, batches: Iterable[Tensor]) -> SavedNetwork:
    """Return a network of torch's own layers alone that computes what the dynamic one does at its mean attention.

    It is exact for a sample whose attention is the mean; what it costs on others has to be measured. Layers with one
    kernel for all samples (`dynamic: false`) are exact, and need no sample.

    Args:
        saved: the dynamic network, which stays as it is.
        batches: calibration images, preprocessed, [batch, channels, height, width] each.

    Raises:
        KWError: no dynamic layer, no calibration image, **or** a layer that none of them reached.
    """
    network = saved.network.eval()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        raise KWError("the network has no dynamic layer: it is static already")
    folded = copy.deepcopy(with_learnt_kernels(network))
    for name, (attention, gates) in _means(
        network, {name: layer for name, layer in layers.items() if not _learnt(layer)}, batches
    ).items():
        _put(folded, name, static_layer(layers[name], attention, gates))
    for name, module in list(folded.named_modules()):
        if isinstance(module, PartialLayer):
            raise KWError(f'"{name}" is dynamic in a part of its rows, and cannot be folded yet')
        if isinstance(module, Adapted):
            _put(folded, name, merged(module, name))
    data = {key: value for key, value in saved.recipe.document.data.items() if key not in DYNAMIC_KEYS}
    recipe = load_recipe(_without_warehouses({**data, "name": f"{saved.recipe.name}-static"}))
    return replace(saved, network=folded.eval(), recipe=recipe)


def is_dynamic(network: nn.Module) -> bool:
    """Return whether a network has a dynamic layer."""
    return any(isinstance(module, KWLayer) for module in network.modules())


def needs_samples(network: nn.Module) -> bool:
    """Return whether a network has a layer whose attention has to be averaged over samples to be folded."""
    return any(isinstance(module, KWLayer) and not _learnt(module) for module in network.modules())


@torch.no_grad()
def with_learnt_kernels(network: nn.Module) -> nn.Module:
    """Return a network with torch's own layers for those that have one kernel for all samples (`dynamic: false`).

    It computes the same, mixing left out. Without such layers it is the network itself, else a copy.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, KWLayer) and _learnt(module)]
    if not names:
        return network
    made = copy.deepcopy(network)
    for name in names:
        layer: Any = made.get_submodule(name)
        _put(made, name, static_layer(layer, layer.attend(torch.empty(0))[0]))
    return made


def _learnt(layer: KWLayer) -> bool:
    return layer.attention is not None and not layer.attention.dynamic


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def tensor_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def static_layer(layer: KWLayer, attention: Tensor, gates: Factors = OPEN) -> nn.Module:
    """Return torch's own layer with the kernel that an attention [mixtures, cells] mixes and gates [channels] scale."""
    kernel = layer.kernels(attention.unsqueeze(0))[0].detach().clone()
    if gates.input is not None:
        groups = gates.input.to(kernel).view(-1, 1, kernel.shape[1], *[1] * (kernel.dim() - 2))
        kernel = (kernel.view(len(groups), -1, *kernel.shape[1:]) * groups).flatten(0, 1)
    if gates.output is not None:
        kernel = kernel * over_rows(gates.output.to(kernel), kernel.dim())
    static: Any
    if isinstance(layer, KWLinear):
        static = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        convolution: Any = layer
        static = STATIC[convolution.dimensions](
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
            convolution.bias is not None,
            convolution.padding_mode,
            device="meta",
        )
    static.weight = nn.Parameter(kernel)
    if layer.bias is not None:
        static.bias = nn.Parameter(layer.bias.detach().clone())
    return static.train(layer.training)


@torch.no_grad()
def merged(layer: Adapted, name: str = "") -> nn.Module:
    """Return one static layer for a static layer and its adapter, both halves of which are static by now.

    Raises:
        KWError: a grouped layer, whose adapter brings the groups together.
    """
    frozen: Any = layer.frozen
    down: Any = layer.down.weight
    up: Any = layer.up.weight
    if getattr(frozen, "groups", 1) > 1:
        raise KWError(f'"{name}" has groups, which its adapter brings together: it cannot be folded into one kernel')
    new = copy.deepcopy(frozen)
    product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
    new.weight = nn.Parameter(frozen.weight + product, requires_grad=False)
    return new  # type: ignore[no-any-return]


@torch.no_grad()
def _means(
    network: nn.Module, layers: Mapping[str, KWLayer], batches: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Factors]]:
    """Return each layer's mean α [mixtures, cells] over all samples, and the means of its gates."""
    sums: dict[nn.Module, _Sum] = {}
    for layer in layers.values():
        for module in filter(None, (layer.attention, layer.attention.gates if layer.attention else None)):
            sums[module] = _Sum()
    with _watching(sums):
        for batch in batches:
            network(batch)
    means: dict[str, tuple[Tensor, Factors]] = {}
    unreached = []
    for name, layer in layers.items():
        attention = layer.attention
        if attention is None or not sums[attention].samples:
            unreached.append(name)
            continue
        gates = OPEN if attention.gates is None else Factors(*sums[attention.gates].means())
        (alpha,) = sums[attention].means()
        assert alpha is not None
        means[name] = alpha, gates
    if unreached:
        raise KWError(f"no calibration image reached the layers {listed(unreached)}")
    return means


class _Sum:
    """Adds up what a module gives, sample by sample: a tensor, or several of which some may be None."""

    def __init__(self) -> None:
        self.samples = 0
        self.totals: list[Tensor | None] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor | Factors) -> None:
        given = [output] if isinstance(output, Tensor) else list(output)
        found = [None if tensor is None else tensor.double().sum(0) for tensor in given]
        before = self.totals if self.samples else [None] * len(found)
        found = [new if old is None or new is None else new + old for new, old in zip(found, before, strict=True)]
        self.totals = found
        self.samples += next(len(tensor) for tensor in given if tensor is not None)

    def means(self) -> list[Tensor | None]:
        """Return the means over all samples."""
        return [None if total is None else (total / self.samples).float() for total in self.totals]


@contextmanager
def _watching(sums: Mapping[nn.Module, _Sum]) -> Iterator[None]:
    handles = [module.register_forward_hook(total) for module, total in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_warehouses(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's data without the warehouses that layers of a Keras-style network name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if key != "warehouse"}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    model = {key: value for key, value in data.get("model", {}).items() if key != "budget"}
    return {**data, "model": plain(model)}
