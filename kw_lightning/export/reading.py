"""An ONNX file that `kw export` wrote, as a network that predicts."""

from __future__ import annotations

from pathlib import Path

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.export.description import KEY, described
from kw_lightning.export.program import OnnxNetwork
from kw_lightning.inference.saving import SavedNetwork


def read_onnx(path: Path, *, threads: int | None = None) -> SavedNetwork:
    """Return the network of a file with its preprocessing and class names.

    Args:
        threads: that a call may use; None leaves it to onnxruntime.

    Raises:
        RunError: onnxruntime is not installed, **or** a file that it does not read or `kw export` did not write.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError(needs(f"{path}: ONNX", "onnxruntime", "onnx", error)) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a family of errors of its own
        raise RunError(f"{path}: not an ONNX file, or a damaged one: {first_line(error)}") from error
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    return described(text, OnnxNetwork(session), str(path))
