"""Figures as matplotlib draws them, without its global state, and how they reach a run's trackers.

The module imports matplotlib where it draws: a run without figures does not wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#1b1c1e", "#c9cacc"
"""The colour of text and axes, and that of rules between parts; a page gives both its own."""
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5"
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same type on every machine
    "svg.hashsalt": "kw_lightning",  # the same bytes for the same figure
    "pdf.fonttype": 42,  # TrueType, as publishers ask
}


@contextmanager
def drawing(**changes: Any) -> Iterator[None]:
    """Draw in the project's style, changed by settings of matplotlib, and without warnings of missing letters."""
    import matplotlib

    settings: Any = {**STYLE, **changes}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Glyph|constrained_layout|Tight layout)", category=UserWarning)
        yield


def spread_sizes(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with marks as 20k and 1M: matplotlib's own need `text.parse_math`."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())


def picture(figure: Figure, dots_per_inch: int = 150) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a figure as pixels [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with drawing():
        figure.patch.set(facecolor="white", alpha=1)
        figure.set_dpi(dots_per_inch)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def publish(loggers: Sequence[Logger], figures: Mapping[str, Figure], step: int) -> None:
    """Show figures in TensorBoard, in MLflow and in every logger that has Lightning's `log_image`, as that of W&B.

    Args:
        loggers: of a run; those that show no pictures are passed over.
        figures: by name, as `attention/stage1`.
        step: optimizer steps of the run until then.
    """
    shown = [logger for logger in loggers if _shows_pictures(logger)]
    for name, figure in figures.items() if shown else ():
        pixels = picture(figure)
        for logger in shown:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, pixels, artifact_file=f"figures/{name}-{step}.png")
            else:
                logger.log_image(name, [pixels], step=step)  # type: ignore[attr-defined]


def _shows_pictures(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or callable(getattr(logger, "log_image", None))
