"""Charts of a page: SVG by matplotlib in the page's colours, with the places and words that a pointer or key reads."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from kw_lightning.callbacks.figures import INK, RULE, drawing
from kw_lightning.callbacks.heat_map import MOST_PIXELS, WIDTH, coarser, draw_matrix, heat_map
from kw_lightning.errors import printable
from kw_lightning.report.attention import EDGES, Array, WarehouseAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 2.7  # inches
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f", "#56b4e9")
"""Okabe and Ito's colours, which the colour-blind tell apart, those that show on white and on black."""
MOST_POINTS = 400  # of a line; a pixel each, about
NAMED_CLASSES = 25  # up to which a confusion matrix has names at its sides


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend and in the words of a point.
        x, y: as long as each other.
        deviation: of y, drawn as a band; empty where there is none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Attributes:
        title: its heading; no markup.
        alternative: what it shows, in words.
        svg: the picture.
        reading: what a pointer and the arrow keys read: `{"series": …}` or `{"grid": …}`, see page.js.
        figure: what the picture was made of.
        key: the name that trackers know it by; empty where it is for the page alone.
    """

    title: str
    alternative: str
    svg: Markup
    reading: Mapping[str, Any] = field(default_factory=dict)
    figure: Figure | None = field(default=None, compare=False, repr=False)
    key: str = ""


def line_chart(title: str, series: Sequence[Series], *, percent: bool = False) -> Chart:
    """Return lines over the epochs; values that are no numbers are left out."""
    with drawing(**{"svg.fonttype": "none"}):
        from matplotlib.ticker import MaxNLocator

        figure, axes = _figure(HEIGHT)
        drawn = [_finite(one) for one in series]
        for index, one in enumerate(drawn):
            colour, dashes = SERIES[index % len(SERIES)], ("-", "--", ":")[index // len(SERIES) % 3]
            marker = {"marker": "o", "markersize": 3.5} if len(one.x) < 12 else {}
            axes.plot(one.x, one.y, dashes, color=colour, label=_label(one.name), **marker)  # type: ignore[arg-type]
            if len(one.deviation):
                low, high = (np.asarray(one.y) + sign * np.asarray(one.deviation) for sign in (-1, 1))
                axes.fill_between(one.x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if len(drawn) > 1:
            axes.legend(loc="best", ncols=1 + len(drawn) // 7, fontsize=7)
        svg = svg_of(figure)
        words = "{:.2%}".format if percent else "{:.4g}".format
        lines = [[(*place, _words(one, k, words)) for k, place in enumerate(_places(axes, one))] for one in drawn]
    told = [f"{one.name} goes from {words(one.y[0])} to {words(one.y[-1])}" for one in drawn if len(one.y)]
    more = f", and {len(told) - 6} more lines" if len(told) > 6 else ""
    return Chart(title, f"Over the epochs, {'; '.join(told[:6])}{more}.", svg, {"series": lines})


def heat_map_chart(found: WarehouseAttention, most: int = MOST_PIXELS) -> Chart:
    """Return the mean attention of a warehouse, by blocks where it has more than `most` values."""
    mean = found.summary.mean
    figure = heat_map(mean, found.shares, most=most)
    with drawing(**{"svg.fonttype": "none"}):
        svg = svg_of(figure)
    values, block = coarser(mean.numpy(), most)
    first, layers = 0, []
    for name, share in found.shares.items():
        layers.append([printable(name), first])
        first += share.mixtures
    reading = _grid(figure.axes[0], values, {"layers": layers, "block": block, "size": list(mean.shape)})
    used = mean.shape[1] - found.summary.dead_cells
    largest = np.unravel_index(int(np.abs(values).argmax()), values.shape)
    words = (
        f"{mean.shape[0]} mixtures of {len(layers)} layers by {mean.shape[1]} cells, of which {used} are in use. "
        f"{found.summary.negative_share:.0%} of all weights are negative; the largest mean is "
        f"{values[largest]:.3g}, of mixture {int(largest[0]) * block} and cell {int(largest[1]) * block}."
    )
    return Chart(f"{found.name}: mean attention", words, svg, {"grid": reading}, figure, f"attention/{found.name}")


def histogram_chart(found: WarehouseAttention) -> Chart | None:
    """Return how the weights of a warehouse are spread, the negative ones on the left; None where it is not known."""
    if found.histogram is None or not found.histogram.sum():
        return None
    shares = found.histogram / found.histogram.sum()
    with drawing(**{"svg.fonttype": "none"}):
        figure, axes = _figure(HEIGHT)
        places = np.arange(len(shares))
        middle = len(shares) // 2
        colours = [SERIES[0] if place < middle else SERIES[1] if place > middle else SERIES[4] for place in places]
        axes.bar(places, shares, width=1.0, color=colours)
        ticks = {0: "−1", 16: "−0.01", middle: "0", middle + 17: "0.01", len(shares) - 1: "1"}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("α, by powers of ten on both sides of 0")
        axes.set_xlim(-0.6, len(shares) - 0.4)
        svg = svg_of(figure)
        tops = _places(axes, Series("", places.tolist(), shares.tolist()))
    words = [
        f"α from {EDGES[k]:.2g} to {EDGES[k + 1]:.2g}: {share:.2%} of the weights" for k, share in enumerate(shares)
    ]
    line = [(*place, text) for place, text in zip(tops, words, strict=True)]
    told = (
        f"{found.summary.negative_share:.1%} of the weights are negative. Most are " + words[int(shares.argmax())][2:]
    )
    key = f"attention/{found.name}-weights"
    return Chart(f"{found.name}: weights", f"{told}.", svg, {"series": [line]}, figure, key)


def confusion_chart(confusion: Array, classes: Sequence[str]) -> Chart:
    """Return a confusion matrix, each row by the images of its class."""
    count = len(confusion)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    with drawing(**{"svg.fonttype": "none"}):
        figure, axes = _figure(WIDTH * 0.84)
        shown = axes.imshow(shares, "Blues", vmin=0, vmax=1, interpolation="none", aspect="auto")
        bar = figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.02, aspect=30, format=lambda value, _: f"{value:.0%}")
        bar.outline.set_linewidth(0)  # type: ignore[operator]
        if count <= NAMED_CLASSES:
            names = [_label(name, 14) for name in classes]
            axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(count), names)
            axes.tick_params(length=0)
        axes.set(xlabel="taken for", ylabel="class")
        svg = svg_of(figure)
        named = [printable(name) for name in classes]
        reading = _grid(axes, confusion, {"names": named, "size": [count, count], "block": 1})
    right = int(np.trace(confusion))
    told = f"{right:,} of {int(confusion.sum()):,} images are taken for their class."
    words = f"{told} Each row is a class, each column what it was taken for."
    return Chart("Confusion matrix", words, svg, {"grid": reading}, figure, "confusion")


def class_use_figure(found: WarehouseAttention, classes: Sequence[str]) -> Figure:
    """Return how much more or less the images of each class use each cell than those of all, in parts of the mean."""
    assert found.class_use is not None
    use = found.class_use
    there = use.sum(axis=1) > 0
    mean = use[there].mean(axis=0)
    ratio = np.where(there[:, None], use / np.maximum(mean, 1e-12) - 1, 0.0)
    with drawing():
        from matplotlib.figure import Figure

        rows = len(ratio)
        figure = Figure((WIDTH, min(max(0.16 * rows + 0.6, 1.6), 8.0)), layout="constrained")
        axes = figure.add_subplot()
        top = max(float(np.quantile(np.abs(ratio), 0.99)), 1e-6)
        told = "use, to the mean of the classes"
        draw_matrix(axes, ratio, top, told, vector=True, format=lambda value, _: f"{value:+.0%}")
        if rows <= 50:
            axes.set_yticks(range(rows), [_label(name, 20) for name in classes[:rows]])
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="cell", ylabel="" if rows <= 50 else "class")
        return figure


def svg_of(figure: Figure) -> Markup:
    """Return a figure for a page: no size of its own, the page's colours, and names of its parts that no other has."""
    written = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    text = text.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    unique = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'(?<![\w:-])id="', f'id="{unique}', text)
    text = re.sub(r"url\(#", f"url(#{unique}", text)
    return Markup(re.sub(r'href="#', f'href="#{unique}', text))


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _finite(series: Series) -> Series:
    """Return the points that are numbers, thinned out evenly where there are very many."""
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    kept = np.flatnonzero(np.isfinite(y))
    if len(kept) > MOST_POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, MOST_POINTS).round().astype(int)]
    deviation = np.asarray(series.deviation, float)[kept].tolist() if len(series.deviation) else ()
    return Series(series.name, x[kept].tolist(), y[kept].tolist(), deviation)


def _places(axes: Axes, series: Series) -> list[tuple[float, float]]:
    """Return where the points of a drawn line are, from the left and from the top, in parts of the figure."""
    if not len(series.x):
        return []
    points = axes.transData.transform(np.column_stack([series.x, series.y]))
    parts = axes.figure.transSubfigure.inverted().transform(points)
    return [(round(float(left), 4), round(float(1 - bottom), 4)) for left, bottom in parts]


def _words(series: Series, place: int, words: Callable[[float], str]) -> str:
    spread = f" ± {words(series.deviation[place])}" if len(series.deviation) else ""
    return f"{printable(series.name)}, epoch {series.x[place]:.4g}: {words(series.y[place])}{spread}"


def _label(name: str, longest: int = 28) -> str:
    """Return a name for a legend or an axis: one short line that does not begin as matplotlib's hidden ones do."""
    name = printable(name).encode("utf-8", "replace").decode()
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return f"\u200b{name}" if name.startswith("_") else name


def _grid(axes: Axes, values: Array, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return a matrix for page.js: its place, and its values as 16 bits in base64, `scale` times what they are.

    Whole numbers that fit stay as they are.
    """
    box = axes.get_window_extent().transformed(axes.figure.transSubfigure.inverted())
    whole = np.issubdtype(values.dtype, np.integer)
    largest = float(np.abs(values).max(initial=0)) or 1.0
    scale = 1.0 if whole and largest <= 32767 else largest / 32767
    coded = np.round(values / scale).astype("<i2").tobytes()
    return {
        "box": [round(float(part), 4) for part in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "rows": values.shape[0],
        "columns": values.shape[1],
        "scale": scale,
        "values": base64.b64encode(coded).decode(),
        **more,
    }
