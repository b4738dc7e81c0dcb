"""A dynamic network folded into a static one: every layer's attention is held at its mean over a calibration set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.errors import KWError
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.nn import KWLayer, KWLinear
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.recipe import load_recipe

STATIC: Mapping[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Number of spatial dimensions → torch's own layer."""
DYNAMIC_KEYS = ("warehouses", "stages", "defaults", "temperature", "engine")
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
    means = _mean_attention(network, {name: layer for name, layer in layers.items() if not _learnt(layer)}, batches)
    for name, attention in means.items():
        _put(folded, name, static_layer(layers[name], attention))
    for name, module in list(folded.named_modules()):
        if isinstance(module, PartialLayer):
            raise KWError(f'"{name}" is dynamic in a part of its rows, and cannot be folded yet')
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


def static_layer(layer: KWLayer, attention: Tensor) -> nn.Module:
    """Return torch's own layer with the kernel that an attention [mixtures, cells] mixes."""
    kernel = layer.kernels(attention.unsqueeze(0))[0].detach().clone()
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
def _mean_attention(network: nn.Module, layers: Mapping[str, KWLayer], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return each layer's mean α [mixtures, cells] over all samples."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(layers, 0)
    with _watching(layers, sums, counts):
        for batch in batches:
            network(batch)
    unreached = [name for name, count in counts.items() if not count]
    if unreached:
        raise KWError(f"no calibration image reached the layers {', '.join(unreached[:5])}")
    return {name: (sums[name] / counts[name]).float() for name in layers}


@contextmanager
def _watching(layers: Mapping[str, KWLayer], sums: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, attention: Tensor) -> None:
            found = attention.double().sum(0)
            sums[name] = sums[name] + found if name in sums else found
            counts[name] += attention.shape[0]

        return hook

    handles = [layer.attention.register_forward_hook(watch(name)) for name, layer in layers.items() if layer.attention]
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
