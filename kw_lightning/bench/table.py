"""Results as people read them: aligned tables, or Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.bench.layers import LayerResult
from kw_lightning.bench.networks import NetworkResult
from kw_lightning.errors import times

NETWORK_HEAD = ("network", "mode", "static", "published form", "this engine", "ratio", "attention", "kept", "GFLOP/s")
LAYER_HEAD = ("layers", "kernel", "map", "path", "static", "published form", "this engine", "ratio", "kept", "GFLOP/s")


def network_rows(name: str, results: Sequence[NetworkResult]) -> list[tuple[str, ...]]:
    """Return one row a mode: times in ms, and ratios to the static network."""
    return [
        (
            name,
            "training" if result.training else "inference",
            milliseconds(result.seconds["static"]),
            _ratio(result.ratios.get("reference")),
            milliseconds(result.seconds["kw"]),
            _ratio(result.ratios["kw"]),
            "" if result.attention is None else f"{result.attention:.1%}",
            _ratio(result.kept["kw"] / max(result.kept["static"], 1)) if result.kept else "",
            f"{result.gflops('kw'):.0f}" if "kw" in result.multiply_adds else "",
        )
        for result in results
    ]


def layer_rows(results: Sequence[LayerResult]) -> list[tuple[str, ...]]:
    """Return one row a layer, or group of equal layers."""
    return [
        (
            result.names[0] + (f" and {len(result.names) - 1} more" if len(result.names) > 1 else ""),
            times(result.kernel),
            times(result.size),
            result.paths[0] if result.paths[0] == result.paths[1] else " / ".join(result.paths),
            milliseconds(result.seconds["static"]),
            _ratio(result.seconds["reference"] / result.seconds["static"]) if "reference" in result.seconds else "",
            milliseconds(result.seconds["kw"]),
            _ratio(result.ratio),
            _ratio(result.kept["kw"] / max(result.kept["static"], 1)),
            f"{result.gflops:.0f}",
        )
        for result in results
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text; words to the left, numbers to the right."""
    table = [head, *rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    numeric = [all(row[column][:1].isdigit() or not row[column] for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in table
    )


def milliseconds(seconds: float) -> str:
    """Return a time with three digits that count."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×"
