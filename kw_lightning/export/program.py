"""A network as a graph, PyTorch's own or ONNX: batch and size stay free, and no operator of ours is inside."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.export.description import KEY, describe
from kw_lightning.export.norms import fold_norms
from kw_lightning.export.static import with_learnt_kernels
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.paths import writable
from kw_lightning.planning import plan

OPSET = 18
"""The ONNX operator set: the first whose padding and reductions take free sizes."""
SIDES = ("depth", "height", "width")
"""What the sides of an input are called in ONNX, where they are free."""


def write_program(saved: SavedNetwork, path: Path) -> str:
    """Write a network as PyTorch's exported program (`.pt2`), its description in the archive's extra files.

    Returns:
        What is free in it, in words.

    Raises:
        RunError: a network that cannot be exported, **or** a file that cannot be written.
    """
    program, free = exported(saved)
    made = BytesIO()  # on a full disk its writer would end the process
    with quiet_export():
        torch.export.save(program, made, extra_files={f"{KEY}.json": describe(saved)})
    with writable(path) as partial:
        partial.write_bytes(made.getbuffer())
    return free


def write_onnx(saved: SavedNetwork, path: Path) -> str:
    """Write a network as ONNX, its description in the model's metadata; needs the extra `onnx`.

    Returns:
        What is free in it, in words.

    Raises:
        RunError: onnx or onnxscript is not installed, a network that cannot be exported, **or** a file that cannot be
            written.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RunError(needs("ONNX", "onnx and onnxscript", "onnx", error)) from None
    program, free = exported(saved)
    sides = SIDES[len(SIDES) + 2 - sample_of(saved).dim() :]
    with writable(path) as partial, quiet_export():
        made = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", **dict(enumerate(sides, start=2))},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={operator.floordiv: _floor_division()},
        )
        assert made is not None
        made.model.metadata_props[KEY] = describe(saved)
        made.save(str(partial))
    return free


def exported(saved: SavedNetwork) -> tuple[ExportedProgram, str]:
    """Return a network's graph, and what is free in it: batch and size, or the batch alone where a network fixes sizes.

    Raises:
        RunError: a network that cannot be traced.
    """
    sample = sample_of(saved)
    network, _ = fold_norms(with_learnt_kernels(saved.network.eval()))
    sizes = dict.fromkeys(range(2, sample.dim()), Dim.DYNAMIC)
    failure = ""
    for free, words in (({0: Dim.DYNAMIC, **sizes}, "batch and size"), ({0: Dim.DYNAMIC}, "batch")):
        try:
            with quiet_export(), torch.no_grad():
                return torch.export.export(network, (sample,), dynamic_shapes=(free,)), words
        except Exception as error:  # what tracing makes of a stranger's forward pass
            failure = first_line(error)
    raise RunError(f"the network cannot be exported: {failure}")


def _floor_division() -> Callable[..., Any]:
    """Return Python's division of whole numbers in ONNX, whose own rounds towards zero."""
    from onnxscript import INT64, opset18

    def floor_division(dividend: INT64, divisor: INT64) -> INT64:
        return opset18.Div(opset18.Sub(dividend, opset18.Mod(dividend, divisor)), divisor)

    # The exporter looks for the types themselves.
    floor_division.__annotations__ = {"dividend": INT64, "divisor": INT64, "return": INT64}
    return floor_division


def sample_of(saved: SavedNetwork) -> Tensor:
    """Return two samples as the network takes them; one would be taken for the only batch there is."""
    shape = (saved.plan or plan(saved.recipe)).input_shape
    if shape is None:
        raise RunError("the shape of the network's input is not known; give it by model.input")
    place = next(iter(saved.network.parameters()), torch.empty(0))
    return torch.zeros(2, *shape, dtype=place.dtype, device=place.device)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporter's notices off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxNetwork(nn.Module):
    """A network in ONNX, run by onnxruntime on the CPU.

    Args:
        session: of onnxruntime, for a file that `write_onnx` wrote.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of images [batch, channels, height, width]."""
        (logits,) = self.session.run(None, {self.input: images.float().numpy()})
        return torch.from_numpy(logits)
