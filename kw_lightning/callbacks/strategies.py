"""Which ways of using several devices suit warehouses, and sharding (FSDP2) that does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from kw_lightning.callbacks.layout import layers_of_warehouses
from kw_lightning.errors import KWError, listed

FSDP1_PART = "._fsdp_wrapped_module"  # FSDP1 puts it behind the name of every module that it wraps
SHARED = "layers in several places share the cells of a warehouse"


def kw_fully_shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """Shard a dynamic network with FSDP2: each warehouse with all its layers as one group, the rest as another.

    `fully_shard` on the blocks of a network alone would gather the cells only while the block that owns them runs, and
    not for layers elsewhere that draw on them. If it is called on every warehouse before, it gathers them at each call
    of a layer, in whatever block that is.

    Args:
        model: a dynamic network, on no strategy yet.
        mesh: the data-parallel mesh; in a LightningModule `self.device_mesh["data_parallel"]`.
        **options: for `torch.distributed.fsdp.fully_shard`, as `reshard_after_forward` or `mp_policy`.

    Returns:
        The network, changed in place.

    Example:
        >>> def configure_model(self):
        ...     if self.net is None:
        ...         self.net = kw_lightning.convert(torchvision.models.resnet18(), "resnet18-kw-1x")
        ...         kw_fully_shard(self.net, self.device_mesh["data_parallel"])
    """
    for _, layers in layers_of_warehouses(model):
        fully_shard(list(layers.values()), mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def check_strategy(trainer: Trainer, module: str | None = None) -> None:
    """Refuse, before the network is made dynamic, strategies that a warehouse cannot live with.

    Args:
        trainer: the Trainer.
        module: path of the submodule that is to become dynamic; None means the whole LightningModule.

    Raises:
        KWError: DeepSpeed's stage 3, **or** processes that are started as copies of this one.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise KWError(
            f"DeepSpeed's stage 3 gathers the weights of one layer at a time, but {SHARED}; "
            'use strategy="ddp" or FSDP2 with kw_fully_shard'
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        # Lightning loads the weights that such processes send back into this process's network, still static.
        network = f"model.{module}" if module else "model"
        raise KWError(
            "a strategy that spawns or forks its processes (ddp_spawn, ddp_fork, ddp_notebook) makes the network "
            f"dynamic in the copies alone; call kw_lightning.convert({network}, recipe) before fit, "
            'or, outside notebooks, use strategy="ddp"'
        )


def check_sharding(model: nn.Module) -> None:
    """Refuse, before the first step, a sharding that takes the cells away from layers that need them.

    Raises:
        KWError: a warehouse in another FSDP group than one of its layers, **or** cells split by tensor parallelism,
            **or** cells that are not in the network.
    """
    modules = dict(model.named_modules())
    for warehouse, layers in layers_of_warehouses(model):
        cells = warehouse.cells
        if isinstance(cells, DTensor) and "tensor_parallel" in (cells.device_mesh.mesh_dim_names or ()):
            raise KWError(
                f'the cells of warehouse "{warehouse.name}" are split by tensor parallelism, which dynamic layers do '
                f"not know: leave {_listed(layers)} out of the plan of parallelize_module"
            )
        owner = next((name for name, layer in layers.items() if "warehouse" in layer._modules), None)
        if owner is None:
            raise KWError(
                f'warehouse "{warehouse.name}" of {_listed(layers)} is owned by a layer that is not in the network, so '
                "that no optimizer trains its cells: delete what still holds that layer, as a variable may, and the "
                "next layer owns them, or convert after layers are replaced"
            )
        if isinstance(warehouse, FSDPModule):
            continue  # a group by itself: its layers call it, wherever they are
        group = next(_groups(modules, f"{owner}.warehouse"), None)
        outside = [name for name in layers if group is not None and group not in _groups(modules, name)]
        if outside:
            raise KWError(
                f'warehouse "{warehouse.name}" is in the FSDP group of "{_listed([owner])}", and {_listed(outside)} '
                f"outside that group draw on it: {SHARED}. Shard with kw_lightning.callbacks.kw_fully_shard, or with "
                "fully_shard on every warehouse first, or (FSDP1) without an auto_wrap_policy"
            )


def _groups(modules: dict[str, nn.Module], path: str) -> Iterator[object]:
    """Yield the FSDP groups that hold a module, the innermost first; modules sharded as a list are one group."""
    while True:
        module = modules[path]
        if isinstance(module, FullyShardedDataParallel):
            yield module
        elif isinstance(module, FSDPModule):
            yield fully_shard.state(module)  # type: ignore[attr-defined]
        if not path:
            return
        path = path.rpartition(".")[0]


def _listed(names: Iterable[str]) -> str:
    return listed([f".{name}".replace(FSDP1_PART, "").lstrip(".") for name in names])
