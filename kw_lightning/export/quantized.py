"""Networks in whole numbers of eight bits, for onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.export.description import KEY, describe
from kw_lightning.export.program import write_onnx
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.paths import writable


def write_int8(folded: SavedNetwork, batches: Iterable[Tensor], path: Path) -> str:
    """Write a static network as ONNX with weights and activations of eight bits; needs the extra `onnx`.

    Weights are scaled channel by channel, activations by the range that they have on calibration images.

    Args:
        folded: of ordinary layers alone, see `fold`: kernels that follow the sample are activations themselves.
        batches: calibration images, preprocessed, [batch, channels, height, width] each.
        path: file to write.

    Returns:
        What is free in it, in words.

    Raises:
        RunError: onnx or onnxruntime is not installed, a network that cannot be exported or quantised, **or** a file
            that cannot be written.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise RunError(needs("int8", "onnx and onnxruntime", "onnx", error)) from None

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.float().numpy()}

    with TemporaryDirectory() as folder:
        whole, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        free = write_onnx(folded, whole)
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it advises steps that were taken already
        try:
            quantization.quantize_static(
                str(whole),
                str(small),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except (ValueError, RuntimeError) as error:
            raise RunError(f"the network cannot be quantised: {first_line(error)}") from error
        finally:
            logging.getLogger().setLevel(level)
        model = onnx.load(str(small))
        if KEY not in {entry.key for entry in model.metadata_props}:
            entry = model.metadata_props.add()
            entry.key, entry.value = KEY, describe(folded)
        with writable(path) as partial:
            partial.write_bytes(model.SerializeToString())
    return free
