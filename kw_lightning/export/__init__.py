"""Trained networks on their way out: as graphs for other runtimes, or folded into static networks."""

from kw_lightning.export.accuracy import Accuracy, compare
from kw_lightning.export.program import write_onnx, write_program
from kw_lightning.export.reading import read_onnx
from kw_lightning.export.static import fold

__all__ = ["Accuracy", "compare", "fold", "read_onnx", "write_onnx", "write_program"]
