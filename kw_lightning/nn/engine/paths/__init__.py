"""All ways to compute a dynamic convolution: a path is a file in the folder of its order, and a line here."""

from __future__ import annotations

from kw_lightning.nn.engine.paths.mix_inputs.at_once import InputsAtOnce
from kw_lightning.nn.engine.paths.mix_inputs.by_cell import InputsByCell
from kw_lightning.nn.engine.paths.mix_inputs.compiled import InputsCompiled
from kw_lightning.nn.engine.paths.mix_kernels.along_rank import AlongRank
from kw_lightning.nn.engine.paths.mix_kernels.by_group import ByGroup
from kw_lightning.nn.engine.paths.mix_kernels.compiled import KernelsCompiled
from kw_lightning.nn.engine.paths.mix_kernels.depthwise import Depthwise
from kw_lightning.nn.engine.paths.mix_kernels.grouped import Grouped
from kw_lightning.nn.engine.paths.mix_kernels.per_sample import PerSample
from kw_lightning.nn.engine.paths.mix_kernels.pointwise import Pointwise
from kw_lightning.nn.engine.paths.mix_kernels.shifted import Shifted
from kw_lightning.nn.engine.paths.mix_kernels.triton import Triton
from kw_lightning.nn.engine.paths.mix_kernels.winograd import Winograd
from kw_lightning.nn.engine.paths.mix_kernels.winograd_along_rank import WinogradAlongRank
from kw_lightning.nn.engine.paths.mix_outputs.at_once import OutputsAtOnce
from kw_lightning.nn.engine.paths.mix_outputs.by_cell import OutputsByCell
from kw_lightning.nn.engine.paths.path import Path, order_of

__all__ = ["PATHS", "Path", "find_path", "order_of"]

PATHS: tuple[Path, ...] = (
    KernelsCompiled(),
    Pointwise(),
    Winograd(),
    AlongRank(),
    WinogradAlongRank(),
    InputsCompiled(),
    Depthwise(),
    ByGroup(),
    Triton(),
    Shifted(),
    InputsByCell(),
    OutputsByCell(),
    InputsAtOnce(),
    OutputsAtOnce(),
    Grouped(),
    PerSample(),
)
"""The only list. Where no times are known, as for grouped convolutions, the first path that can compute is taken."""

_BY_NAME = {path.name: path for path in PATHS}


def find_path(name: str) -> Path | None:
    """Return the path of a name, None where there is none."""
    return _BY_NAME.get(name)
