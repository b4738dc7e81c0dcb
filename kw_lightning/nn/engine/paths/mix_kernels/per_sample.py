"""Mix whole kernels, then call the library's convolution once per sample."""

from __future__ import annotations

from kw_lightning.nn.engine.costs import Fitted, Units
from kw_lightning.nn.engine.paths.calling import CallingPath


class PerSample(CallingPath):
    """One convolution per sample."""

    name = "mix_kernels/per_sample"
    fitted = Fitted(
        Units(5.7e-11, 3.7e-11, 1.4e-09, 0.00012, 0.00032), Units(1.3e-10, 7.3e-11, 3.2e-09, 0.00024, 0.00061)
    )
    grouped = False
