"""Trained networks on their way out: as graphs for other runtimes, or folded into static networks."""

from kw_lightning.export.accuracy import Accuracy, compare
from kw_lightning.export.executorch import write_executorch
from kw_lightning.export.openvino import read_openvino, write_openvino
from kw_lightning.export.program import write_onnx, write_program
from kw_lightning.export.quantized import write_int8
from kw_lightning.export.reading import read_onnx
from kw_lightning.export.static import fold, is_dynamic, needs_samples, tensor_bytes
from kw_lightning.export.tuning import tune

__all__ = [
    "Accuracy",
    "compare",
    "fold",
    "is_dynamic",
    "needs_samples",
    "read_onnx",
    "read_openvino",
    "tensor_bytes",
    "tune",
    "write_executorch",
    "write_int8",
    "write_onnx",
    "write_openvino",
    "write_program",
]
