"""What figures have in common."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from kw_lightning.callbacks.figures import drawing, spread_sizes


def test_sizes_on_a_logarithmic_axis_are_marked_in_words() -> None:
    text = io.StringIO()
    with drawing(**{"svg.fonttype": "none"}):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([13_354, 1_125_680], [89, 90])
        spread_sizes(axes)
        figure.savefig(text, format="svg")
    drawn = text.getvalue()
    assert all(f">{mark}<" in drawn for mark in ("20k", "50k", "1M"))
    assert "mathdefault" not in drawn
