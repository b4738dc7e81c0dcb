"""Mix whole kernels, then call the library's grouped convolution once per chunk of samples: the published form."""

from __future__ import annotations

from kw_lightning.nn.engine.costs import Fitted, Units
from kw_lightning.nn.engine.paths.calling import CallingPath


class Grouped(CallingPath):
    """One grouped convolution per chunk of samples."""

    name = "mix_kernels/grouped"
    fitted_gpu = Fitted(
        Units(0, 3.5e-14, 0, 0, 0.0027),
        Units(0, 3.1e-14, 8.7e-12, 0, 0.0018),
    )
    fitted = Fitted(Units(5.8e-11, 3.1e-11, 1.4e-09, 0.00034, 0), Units(1.3e-10, 6.5e-11, 3.5e-09, 0.00056, 0))
    grouped = True
