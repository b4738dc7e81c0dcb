"""A network for ExecuTorch, PyTorch's runtime for phones and small boards: batch and size are fixed in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.export.description import describe
from kw_lightning.export.norms import fold_norms
from kw_lightning.export.program import quiet_export, sample_of
from kw_lightning.export.static import with_learnt_kernels
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.paths import writable


def write_executorch(saved: SavedNetwork, path: Path, *, portable: bool = False) -> str:
    """Write a network for ExecuTorch, and its description beside it as `.json`.

    The runtime plans its memory beforehand, so the file is for one image of the network's usual size.

    Args:
        saved: the network.
        path: of the file.
        portable: take the portable kernels alone, which every build of the runtime has; else XNNPACK computes what it
            can, all of a static network.

    Returns:
        What is fixed in it, in words.

    Raises:
        RunError: executorch is not installed, a network that cannot be exported, **or** a file that cannot be written.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise RunError(needs("ExecuTorch", "executorch", "executorch", error)) from None
    network, _ = fold_norms(with_learnt_kernels(saved.network.eval()))
    image = sample_of(saved)[:1]
    try:
        with quiet_export(), torch.no_grad():
            exported = torch.export.export(network, (image,))
            partitioners = [] if portable else [XnnpackPartitioner()]
            made: Any = to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch()
    except Exception as error:  # what lowering makes of a stranger's operators
        raise RunError(f"the network cannot be exported for ExecuTorch: {first_line(error)}") from error
    with writable(path) as partial:
        partial.write_bytes(made.buffer)
        partial.with_suffix(".json").write_text(describe(saved), encoding="utf-8")
    return f"nothing: it takes {list(image.shape)}"
