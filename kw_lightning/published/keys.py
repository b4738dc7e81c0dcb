"""The authors' names: how a checkpoint of theirs calls what a network of ours holds, key by key.

Their ResNets and MobileNetV2s are laid out as torchvision's; their ConvNeXt as its authors'. All cells lie in one list
(`warehouse_manager.weights.K`), in the order in which the layers are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from kw_lightning.errors import RunError, mistake
from kw_lightning.nn import KWLayer, KWLinear

ATTENTION = {"reduce": "fc1", "norm": "norm1", "expand": "fc2", "basis": "fc3", "basis_bias": "basis_bias"}
CELLS = "warehouse_manager.weights"
_CONVNEXT_BLOCK = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}


@dataclass(frozen=True)
class Entry:
    """One tensor under both names.

    Attributes:
        ours: key in `network.state_dict()`.
        published: key in the authors' checkpoint.
        shape: there; the numbers are the same, in the same order.
    """

    ours: str
    published: str
    shape: tuple[int, ...]


def published_entries(network: nn.Module, backbone: str) -> tuple[Entry, ...]:
    """Return every tensor of a network under both names, in the network's order; temperatures are not among them.

    Args:
        network: dynamic or static, on the meta device too.
        backbone: `torchvision/NAME` as in its recipe.

    Raises:
        RunError: a network that the authors have not published.
    """
    family = _family(backbone)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, KWLayer)}
    for name, layer in layers.items():
        if layer.attention is not None and not layer.attention.published:
            raise RunError(f'the authors\' layout has no place for the attention of "{name}": {layer.attention!r}')
    numbers = _numbers(layers, family)
    entries = []
    for key, tensor in network.state_dict().items():
        owner = next((name for name in _prefixes(key) if name in layers), None)
        shape = tuple(tensor.shape)
        if owner is None:
            published = family.key(key)
            entries.append(Entry(key, published, (1, *shape) if published.endswith(".gamma") else shape))
            continue
        rest = key.removeprefix(f"{owner}.")
        name = family.dynamic(owner, isinstance(layers[owner], KWLinear))
        if rest == "warehouse.cells":
            missing = family.cell_dimensions - len(shape) if isinstance(layers[owner], KWLinear) else 0
            entries.append(Entry(key, f"{CELLS}.{numbers[owner]}", shape + (1,) * missing))
        elif rest.startswith("attention."):
            part, _, last = rest.removeprefix("attention.").partition(".")
            flat = (tensor.numel(),) if part == "basis_bias" else shape
            entries.append(Entry(key, ".".join(filter(None, (name, "attention", ATTENTION[part], last))), flat))
        elif rest == "bias":
            entries.append(Entry(key, f"{name}.bias", shape))
    return tuple(entries)


@dataclass(frozen=True)
class _Family:
    """One kind of network.

    Attributes:
        module: our name of a module → the authors' name.
        wrapped: whether their linear layers hold a 1-D convolution called `conv`.
        cell_dimensions: of the cells of what is a linear layer here.
        first: sorts our names of layers as the authors make them.
    """

    module: Callable[[str], str]
    wrapped: bool
    cell_dimensions: int
    first: Callable[[str], int]

    def key(self, key: str) -> str:
        """Return the authors' key of a static tensor."""
        module, _, last = key.rpartition(".")
        return f"{self.module(module)}.gamma" if last == "layer_scale" else f"{self.module(module)}.{last}"

    def dynamic(self, name: str, linear: bool) -> str:
        """Return the authors' name of a dynamic layer."""
        # Their static classifier of MobileNetV2 is called `classifier`, the dynamic one `classifier.1`.
        return f"{name}.conv" if linear and self.wrapped else self.module(name)


def _same(name: str) -> str:
    return name


def _mobilenet(name: str) -> str:
    return "classifier" if name == "classifier.1" else name


def _convnext(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "classifier":
        return {"0": "norm", "2": "head"}[parts[1]]
    place = int(parts[1])
    if place == 0 or place % 2 == 0:
        return f"downsample_layers.{place // 2}.{parts[2]}"
    block = f"stages.{place // 2}.{parts[2]}"
    if len(parts) < 5:
        return block
    return f"{block}.{_CONVNEXT_BLOCK[parts[4]]}"


def _downsampling_first(name: str) -> int:
    return int(name.split(".")[1]) % 2


_FAMILIES: Mapping[str, _Family] = {
    "resnet": _Family(_same, False, 4, lambda name: 0),
    "mobilenet_v2": _Family(_mobilenet, True, 4, lambda name: 0),
    "convnext": _Family(_convnext, False, 5, _downsampling_first),
}


def _family(backbone: str) -> _Family:
    library, _, name = backbone.partition("/")
    found = next((family for start, family in _FAMILIES.items() if name.startswith(start)), None)
    if library != "torchvision" or found is None:
        allowed = [f"torchvision/{start}…" for start in _FAMILIES]
        raise RunError(f"the authors' layout is known of their networks only: {mistake(backbone, allowed)}")
    return found


def _numbers(layers: Mapping[str, KWLayer], family: _Family) -> dict[str, int]:
    """Return the authors' number of the warehouse of each layer that owns one."""
    order: dict[int, int] = {}
    for name in sorted(layers, key=family.first):  # stable: otherwise in the network's order
        order.setdefault(id(layers[name].warehouse), len(order))
    return {name: order[id(layer.warehouse)] for name, layer in layers.items()}


def _prefixes(key: str) -> list[str]:
    """Return the modules that a key lies in, the innermost first."""
    parts = key.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
