"""The method in plain PyTorch: partition, attention, warehouse, layers, and the engine that computes them."""

from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.convolutions import KWConv1d, KWConv2d, KWConv3d
from kw_lightning.nn.layer import KWLayer
from kw_lightning.nn.linear import KWLinear
from kw_lightning.nn.partition import LayerPartition, PartitionError, WarehousePartition, partition
from kw_lightning.nn.sharing import attach_warehouse, share_warehouse
from kw_lightning.nn.warehouse import Warehouse, set_temperature, warehouses

__all__ = [
    "ContrastingAttention",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLayer",
    "KWLinear",
    "LayerPartition",
    "PartitionError",
    "Warehouse",
    "WarehousePartition",
    "attach_warehouse",
    "partition",
    "set_temperature",
    "share_warehouse",
    "warehouses",
]
