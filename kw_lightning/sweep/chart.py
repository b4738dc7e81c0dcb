"""Accuracy over parameters, as an SVG."""

from __future__ import annotations

import io

from kw_lightning.callbacks.figures import drawing, spread_sizes
from kw_lightning.sweep.results import Results
from kw_lightning.sweep.table import NAMES, PLAIN

WIDE = 4
"""Parameters that differ by more than this factor are drawn on a logarithmic axis."""


def draw(results: Results) -> str:
    """Return the chart of results that have any figures: of every row its mean and its deviation.

    The test images' figures where there are some, else those of the validation images, which chose the checkpoints.
    """
    # slow to import
    from matplotlib.figure import Figure

    part, metric = results.parts[-1], results.manifest.metric
    unit, scale = ("", 1.0) if metric in PLAIN else (", %", 100.0)
    points = [(row, found) for row in results.rows if (found := row.parts[part].summary) is not None]
    sizes = [row.entry.parameters for row, _ in points]
    with drawing(**{"svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for row, found in points:
            place = (row.entry.parameters, scale * found.mean)
            spread = scale * found.deviation if found.deviation is not None else None
            axes.errorbar(*place, yerr=spread, fmt="o", capsize=3)
            axes.annotate(row.entry.label, place, xytext=(6, 6), textcoords="offset points", fontsize="small")
        if max(sizes) > WIDE * min(sizes):
            spread_sizes(axes)
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"{NAMES[part]} {metric}{unit}")
        axes.margins(x=0.2, y=0.15)
        axes.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
