"""The attention of a warehouse as a picture: mixtures by cells, as the paper's figure 3.

Paper: KernelWarehouse (ICML 2024), figure 3. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kw_lightning.callbacks.figures import INK, drawing
from kw_lightning.nn.partition import LayerPartition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = np.ndarray[Any, np.dtype[Any]]

COLOURS = "RdBu_r"
"""ColorBrewer's red to blue, which the colour-blind tell apart; white is 0."""
WIDTH, LOWEST, HIGHEST = 4.6, 1.6, 8.0  # inches
MOST_PIXELS = 160_000  # values that are drawn; of a larger matrix the largest of each block, so that no line is lost
MOST_SHAPES = 20_000  # cells of a matrix that are drawn one by one in a vector file; above, they are an image in it


def heat_map(
    mean: Tensor, layers: Mapping[str, LayerPartition] | None = None, *, vector: bool = False, most: int = MOST_PIXELS
) -> Figure:
    """Return a figure of a warehouse's mean attention: red above 0, white at 0, blue under 0.

    Lines part the layers, whose names stand beside their mixtures, and dots mark the cell that each mixture started as.

    Args:
        mean: the mean of α, [m_t, n].
        layers: the warehouse's layers by name, in its order, with their shares of it.
        vector: draw each cell as a shape of its own, for files that are scaled without pixels.
        most: how many values are drawn of a matrix that is not drawn so, see `coarser`.
    """
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        values = mean.detach().float().cpu().numpy()
        rows, columns = values.shape
        height = min(max(WIDTH * 0.72 * rows / columns + 0.6, LOWEST), HIGHEST)
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        top = max(float(np.abs(values).max(initial=0.0)), 1e-12)
        shown, block = (values, 1) if vector else coarser(values, most)
        draw_matrix(axes, shown, top, "mean α", block=block, vector=vector)
        axes.set(xlabel="cell", ylabel="" if layers else "mixture", xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
        for axis in (axes.xaxis, axes.yaxis):  # numbers of cells and mixtures, also of a few
            axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if layers:
            _mark_layers(axes, layers, height)
            _mark_start(axes, layers, height)
        return figure


def coarser(values: Matrix, most: int) -> tuple[Matrix, int]:
    """Return a matrix by blocks of which the value with the largest magnitude stands for all, and the block's side."""
    side = max(int(np.ceil(np.sqrt(values.size / most))), 1)
    rows, columns = (-(-length // side) for length in values.shape)
    if side == 1:
        return values, 1
    padded = np.zeros((rows * side, columns * side), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows, columns, -1)
    chosen = np.abs(blocks).argmax(axis=-1)
    return np.take_along_axis(blocks, chosen[..., None], axis=-1)[..., 0], side


def draw_matrix(
    axes: Axes, values: Matrix, top: float, label: str, *, block: int = 1, vector: bool = False, **options: Any
) -> None:
    """Draw a matrix in colours about 0, with a bar that tells them.

    Args:
        axes: to draw in.
        values: [rows, columns].
        top: the value of full colour.
        label: what the bar tells.
        block: side of the square of cells that each value stands for.
        vector: draw each cell as a shape of its own where they are not very many.
        options: of the bar.
    """
    rows, columns = values.shape
    shown: Any
    if vector and values.size <= MOST_SHAPES:
        edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
        shown = axes.pcolormesh(*edges, values, cmap=COLOURS, vmin=-top, vmax=top, edgecolors="face", linewidth=0.1)
        axes.invert_yaxis()
    else:
        extent = (-0.5, columns * block - 0.5, rows * block - 0.5, -0.5)
        look: Any = {"interpolation": "none", "aspect": "auto", "extent": extent}
        shown = axes.imshow(values, COLOURS, vmin=-top, vmax=top, **look)
    bar: Any = axes.figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.02, aspect=30, label=label, **options)
    bar.outline.set_linewidth(0)
    if vector:
        bar.solids.set(rasterized=False, edgecolor="face")


def _mark_layers(axes: Axes, layers: Mapping[str, LayerPartition], height: float) -> None:
    """Part the layers by lines and name them, those that have the room."""
    counts = [layer.mixtures for layer in layers.values()]
    ends = np.cumsum(counts)
    middles = ends - np.array(counts) / 2 - 0.5
    gap = 0.14 * ends[-1] / height  # mixtures in the height of a name
    places, names, last = [], [], -np.inf
    for middle, name in zip(middles, layers, strict=True):
        if middle - last >= gap:
            places.append(middle)
            names.append(name if len(name) <= 32 else f"…{name[-31:]}")
            last = middle
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color=INK, linewidth=0.5)


def _mark_start(axes: Axes, layers: Mapping[str, LayerPartition], height: float) -> None:
    initial = [cell for layer in layers.values() for cell in layer.initial_cells]
    cells = next(iter(layers.values())).cells
    started = [(cell, mixture) for mixture, cell in enumerate(initial) if cell < cells]  # from there on the zero cell
    if started:
        step = 72 * min(height / len(initial), WIDTH * 0.7 / cells)  # points of the smaller side of a cell
        size = min(max(step * 0.35, 0.5), 3.0)
        axes.plot(
            *zip(*started, strict=True), linestyle="none", marker="o", markersize=size, color=INK, markeredgewidth=0
        )
