"""Keras's `summary()` of a network: every layer with its shape, parameters, connections and warehouse."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kw_lightning.keras.network import Network


@dataclass(frozen=True)
class SummaryTable:
    """A network to print with rich: a table on a terminal, aligned plain text in a pipe."""

    network: Network

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table and the total."""
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="bold")
        for title in ("layer", "type", "output shape", "parameters", "connected to", "warehouse"):
            table.add_column(title, justify="right" if title == "parameters" else "left", overflow="fold")
        for row in self.network.summary():
            connected = ", ".join(row.connected_to)
            shape = ", ".join(map(str, row.output_shape))
            table.add_row(row.name, row.type, shape, f"{row.parameters:,}", connected, row.warehouse)
        yield table
        yield Text("")
        yield Text(f"static network    {self.network.parameters:,} parameters")
