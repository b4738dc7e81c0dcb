"""`kw attention`: what a trained network's attention does, as numbers and as figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import CheckpointArgument, InsideArgument, RunCodeOption, SplitOption


def attention(
    run: CheckpointArgument,
    overrides: InsideArgument = None,
    split: SplitOption = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="best|last|FILE", help="Of a run folder. \\[default: the chosen one]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="\\[default: attention/CHECKPOINT-SPLIT in the run folder]")
    ] = None,
    allow_python: RunCodeOption = None,
) -> None:
    """Measure the attention of a trained network over its data, and draw the paper's figure 3 for it.

    Writes attention.npz and, of each warehouse, the mean attention and how the classes use its cells as SVG, PDF and
    PNG. Prints its cells and its layers.
    """
    # slow to import: torch and lightning
    from kw_lightning.cli.output import console
    from kw_lightning.report.papers import write_attention
    from kw_lightning.report.parts import layers_table, warehouses_table

    written = write_attention(
        run,
        overrides or (),
        checkpoint=checkpoint,
        split=split,
        output=output,
        allow_python=tuple(allow_python or ()),
    )
    screen = console()
    for table in (warehouses_table(written.warehouses), layers_table(written.warehouses)):
        screen.print(table.rich())
    told = f"{written.images:,} {written.split} images, {written.checkpoint.name} -> {written.folder}"
    screen.print(told, highlight=False, soft_wrap=True)
