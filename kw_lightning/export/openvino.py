"""A network for OpenVINO: its model file (`.xml`, with the weights in a `.bin` beside it), by way of ONNX."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.export.description import KEY, describe, described
from kw_lightning.export.program import write_onnx
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.paths import writable

SUFFIX = ".xml"


def write_openvino(saved: SavedNetwork, path: Path) -> str:
    """Write a network for OpenVINO, its description among the model's own; needs the extras `onnx` and `openvino`.

    Returns:
        What is free in it, in words.

    Raises:
        RunError: openvino or onnx is not installed, a path that does not end in `.xml`, a network that cannot be
            exported, **or** a file that cannot be written.
    """
    openvino = _imported(path)
    if path.suffix != SUFFIX:
        raise RunError(f"{path}: OpenVINO's files end in {SUFFIX}; the weights are written beside it as .bin")
    with TemporaryDirectory() as folder:
        between = Path(folder) / "network.onnx"
        free = write_onnx(saved, between)
        model = openvino.convert_model(between)
        model.set_rt_info(describe(saved), [KEY])
        with writable(path) as partial:
            openvino.save_model(model, partial, compress_to_fp16=False)
    return free


def read_openvino(path: Path, *, threads: int | None = None) -> SavedNetwork:
    """Return the network of a file with its preprocessing and class names.

    Args:
        threads: that a call may use; None leaves it to OpenVINO.

    Raises:
        RunError: openvino is not installed, **or** a file that it does not read or `kw export` did not write.
    """
    openvino = _imported(path)
    core = openvino.Core()
    try:
        model = core.read_model(path)
        text = str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None
        settings = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise RunError(f"{path}: not a file of OpenVINO, or a damaged one: {first_line(error)}") from error
    return described(text, OpenvinoNetwork(compiled), str(path))


class OpenvinoNetwork(nn.Module):
    """A network run by OpenVINO on the CPU, in single precision.

    Args:
        compiled: model of openvino.
    """

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of images [batch, channels, height, width]."""
        return torch.from_numpy(self.compiled(images.float().numpy())[0].copy())


def _imported(path: Path) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RunError(needs(f"{path}: OpenVINO", "openvino", "openvino", error)) from None
    return openvino
