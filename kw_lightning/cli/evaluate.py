"""`kw evaluate`: the metrics again, from a checkpoint alone."""

from __future__ import annotations

from typing import Annotated

import typer

from kw_lightning.cli.arguments import CheckpointArgument, InsideArgument, RunCodeOption, SplitOption


def evaluate(
    checkpoint: CheckpointArgument,
    overrides: InsideArgument = None,
    split: SplitOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    allow_python: RunCodeOption = None,
) -> None:
    """Measure a checkpoint on a part of its recipe's data; of a run folder, the chosen checkpoint.

    Chosen is the best one by train.monitor, or the last where no images validate. Recall and precision
    of each class follow, or, of more than ten classes, of the worst.
    """
    # slow to import: torch and lightning
    from kw_lightning.cli.output import console
    from kw_lightning.fit.evaluation import evaluate as measure
    from kw_lightning.fit.report import classes_table, json_text, metrics_table

    evaluation = measure(checkpoint, overrides or (), split=split, allow_python=tuple(allow_python or ()))
    if json:
        found = {"checkpoint": str(evaluation.checkpoint), "split": evaluation.split, "epoch": evaluation.epoch}
        typer.echo(json_text({**evaluation.metrics, **found, "classes": evaluation.classes}))
    else:
        console().print(metrics_table({f"{evaluation.split}, {evaluation.checkpoint.name}": evaluation.metrics}))
        if evaluation.classes:
            console().print(classes_table(evaluation.classes))
