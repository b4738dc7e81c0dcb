"""Calls of products.c: products of rows with one vector, in single precision on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.native.attention import SHARED, threads_for
from kw_lightning.nn.engine.native.library import library


def row_products(rows: Tensor, other: Tensor) -> Tensor:
    """Return the product of each row with a vector, [rows].

    Args:
        rows: [rows, columns].
        other: [columns], of the same type and device.
    """
    alone = rows.numel() <= SHARED or rows.dtype != torch.float32 or rows.device.type != "cpu"
    loaded = None if alone else library()
    if loaded is None:
        return torch.mv(rows, other)
    rows, other, products = rows.contiguous(), other.contiguous(), rows.new_empty(len(rows))
    count, length = rows.shape
    threads = threads_for(rows.numel(), count)
    loaded.kw_row_products(rows.data_ptr(), count, length, other.data_ptr(), products.data_ptr(), threads)
    return products
