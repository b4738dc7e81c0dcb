"""The warehouse: the cells that a group of layers shares, owned once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from kw_lightning.errors import mistake, times
from kw_lightning.nn.engine.workspace import in_huge_pages
from kw_lightning.nn.partition import LayerPartition, WarehousePartition
from kw_lightning.nn.weighing import SoftmaxAnnealing

CellStart = Literal["kernels", "projection", "zeros"]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "forward")
OWN = ("_served", "_first", "_copies", "_as_copied")  # attributes that a copy has of its own


class Warehouse(nn.Module):
    """The n kernel cells of a group of layers, and the temperature of their attention.

    It is a submodule of the first layer that draws on it; the other layers refer to it without registering it. So each
    cell is once in `parameters()` and once in `state_dict()`, however many layers share it. If another module takes the
    place of its first layer, it becomes a submodule of the next.

    Averages of a network (`AveragedModel`, the EMA of timm, ultralytics …) are deep copies whose tensors are written
    from outside, τ among them, and an average of past temperatures would lag behind. So `set_temperature` sets τ in
    deep copies, too, if their cells have changed since they were made, until a copy's own temperature is set.
    A copy that nobody changes keeps its temperature, and so does one that is trained itself.

    Args:
        name: the name in the recipe.
        partition: the geometry.
        softmax_annealing: how the temperature of its layers' softmax falls; None where it stays 1.
        start: how the cells are drawn, see `reset_parameters`.

    Attributes:
        cells: [n, co, ci, *ck].
        temperature: τ, a scalar buffer; changed in place, so a compiled network is not compiled anew.
        softmax_temperature: T of its layers' softmax, a scalar buffer like τ; None where it stays 1.
        softmax_annealing: how T falls, for who trains the network.
        doubted: whether a layer has warned of where its batch may be: one warning serves them all.
    """

    temperature: Tensor
    softmax_temperature: Tensor | None

    def __init__(
        self,
        name: str,
        partition: WarehousePartition,
        *,
        softmax_annealing: SoftmaxAnnealing | None = None,
        start: CellStart = "kernels",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.mixtures = partition.mixtures
        cells = torch.empty(partition.cells, *partition.cell_shape, device=device, dtype=dtype)
        # The passes read short lines of all cells, each of which is in other pages.
        self.cells = nn.Parameter(cells if is_fake(cells) else in_huge_pages(cells))
        exact = torch.promote_types(self.cells.dtype, torch.float32)
        self.register_buffer("temperature", torch.empty((), device=device, dtype=exact))
        self.softmax_annealing = softmax_annealing
        softmax = None if softmax_annealing is None else torch.empty((), device=device, dtype=exact)
        self.register_buffer("softmax_temperature", softmax)
        self._layers = partition.layers
        self._start = start
        self.doubted = False
        self._served: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self._first: ReferenceType[nn.Module] | None = None
        self._copies: WeakSet[Warehouse] = WeakSet()
        self._as_copied: tuple[int, int] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set τ = 1 and T to its start, and draw the cells: normal, std = sqrt(2 / (cells of the layer · co · Πck)).

        Cells that no layer starts from are drawn as if the whole warehouse were one layer. With the start "projection"
        std is 1 / sqrt(ci · Πkernel), by which a kernel keeps the size of its input; with "zeros" all cells are 0.
        """
        self.temperature.fill_(1.0)
        if self.softmax_temperature is not None and self.softmax_annealing is not None:
            self.softmax_temperature.fill_(self.softmax_annealing.start)
        with torch.no_grad():
            if self._start == "zeros":
                self.cells.zero_()
                return
            if self._start == "projection":
                self.cells.normal_(std=1 / math.sqrt(max(math.prod(layer.kernel_shape[1:]) for layer in self._layers)))
                return
            _draw(self.cells, len(self.cells))
            for layer in self._layers:
                _draw(self.cells[layer.first_cell : layer.first_cell + layer.own_cells], layer.own_cells)

    def forward(self, x: Tensor, compute: Callable[[Tensor, Warehouse], Tensor]) -> Tensor:
        """Return what a layer makes of x with the cells as they are now, as hooks have loaded, gathered or masked them.

        Layers call it where something asks for calls, see `called`.

        Args:
            x: the layer's input, which hooks look at.
            compute: makes the layer's output of x and the warehouse.
        """
        return compute(x, self)

    @property
    def called(self) -> nn.Module | None:
        """Return what layers call to compute with the cells; None where nothing asks for it, and they just take them.

        It is the warehouse where that has hooks, or another module that was put in its place in its first layer, as
        adapters are.
        """
        first = None if self._first is None else self._first()
        placed = self if first is None else first._modules.get("warehouse", self)
        if placed is not self:
            return placed
        own = vars(self)
        return self if any(map(own.get, HOOKS)) else None

    def set_temperature(self, temperature: float) -> None:
        """Set τ for every layer of the warehouse.

        Raises:
            ValueError: a temperature outside [0, 1].
        """
        if not 0.0 <= temperature <= 1.0:
            raise ValueError(f"a temperature is between 0 and 1: found {temperature}")
        self._as_copied = None
        self._fill("temperature", temperature)

    def set_softmax_temperature(self, temperature: float) -> None:
        """Set T for every layer of the warehouse.

        Raises:
            ValueError: a temperature that is not positive, **or** a warehouse whose T stays 1.
        """
        if self.softmax_temperature is None or not 0.0 < temperature < math.inf:
            allowed = "a number over 0" if self.softmax_temperature is not None else "1, without softmax_annealing"
            raise ValueError(mistake(temperature, allowed, what="the softmax's temperature"))
        self._as_copied = None
        self._fill("softmax_temperature", temperature)

    def serve(self, layer: nn.Module) -> None:
        """Remember a layer that draws on the warehouse, in the network's order, as long as it is there."""
        self._served[layer] = None
        if "warehouse" in layer._modules:
            self._first = ref(layer)
        finalize(layer, self._pass_on).atexit = False

    def _pass_on(self) -> None:
        """Become a submodule of the first layer that is left, unless one has it: else no optimizer has the cells."""
        left = list(self._served)
        if left and not any("warehouse" in layer._modules for layer in left):
            vars(left[0]).pop("warehouse")
            left[0]._modules["warehouse"] = self
            self._first = ref(left[0])

    @property
    def temperatures(self) -> tuple[Tensor, ...]:
        """Return τ, and T where there is one, as an attention takes them."""
        return (self.temperature,) if self.softmax_temperature is None else (self.temperature, self.softmax_temperature)

    def _fill(self, buffer: str, temperature: float) -> None:
        getattr(self, buffer).fill_(temperature)
        for twin in self._copies:
            if twin._is_average():
                twin._fill(buffer, temperature)

    def _is_average(self) -> bool:
        return self._as_copied not in (None, self._cells_as_they_are()) and self.cells.grad is None

    def _cells_as_they_are(self) -> tuple[int, int]:
        """Return what changes when the cells are written, or exchanged for others."""
        cells = self.cells
        version = 0 if cells.is_inference() else cells._version
        return version, 0 if is_fake(cells) or is_functorch_wrapped_tensor(cells) else cells.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Warehouse:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # Not of the class that torch.nn.utils.parametrize makes, which refuses it.
        twin.__setstate__(copy.deepcopy(Warehouse.__getstate__(self), memo))
        twin._as_copied = twin._cells_as_they_are()
        self._copies.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._served, self._first, self._copies, self._as_copied = WeakKeyDictionary(), None, WeakSet(), None

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # τ and T are not turned to half precision with their network: a schedule of 10⁵ steps needs its digits.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        unchanged = self._as_copied is not None and self._as_copied == self._cells_as_they_are()
        # Cells have no memory format: of rank 5, they would be refused as channels_last and with them the network.
        super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.dim() > 2 else fn(t), recurse)
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype.itemsize < torch.float32.itemsize:
                self._buffers[name] = buffer.to(moved.device)
        if unchanged:  # only moved, or turned to another type
            self._as_copied = self._cells_as_they_are()
        return self

    def extra_repr(self) -> str:
        cell = times(self.cells.shape[1:])
        return f"{self.name!r}, cells={len(self.cells)}, cell={cell}, mixtures={self.mixtures}"


def warehouses(model: nn.Module) -> dict[str, Warehouse]:
    """Return the warehouses of a network by name, in the network's order.

    Raises:
        ValueError: two warehouses of one name, as two networks side by side may have them.
    """
    found: dict[str, Warehouse] = {}
    for warehouse in _every_warehouse(model):
        if warehouse.name in found:
            raise ValueError(f'two warehouses are called "{warehouse.name}": ask each network for its own')
        found[warehouse.name] = warehouse
    return found


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set τ of every warehouse of a network; see `Warehouse.set_temperature`.

    Raises:
        ValueError: a temperature outside [0, 1].
    """
    for warehouse in _every_warehouse(model):
        warehouse.set_temperature(temperature)


def _every_warehouse(model: nn.Module) -> list[Warehouse]:
    return [module for module in model.modules() if isinstance(module, Warehouse)]


def _draw(cells: Tensor, count: int) -> None:
    if count:
        nn.init.normal_(cells, std=math.sqrt(2 / (count * cells.shape[1] * math.prod(cells.shape[3:]))))


__all__ = ["LayerPartition", "Warehouse", "set_temperature", "warehouses"]
