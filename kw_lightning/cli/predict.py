"""`kw predict`: class names and scores for images."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import ModelArgument, RunCodeOption
from kw_lightning.errors import RunError, first_line

if TYPE_CHECKING:
    from kw_lightning.inference import ImageClassifier, Prediction

WORKERS_FROM = 256
"""Images from which processes that read them are worth their start."""


def predict(
    model: ModelArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES", help="Files, folders (searched below too), globs, or a CSV with a path column."
        ),
    ],
    top: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="How many classes to name, the likeliest first. [default: 1; of several labels an image all]",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            min=0,
            max=1,
            help="Least score of a class that is named. [default: 0; of several labels an image 0.5 without --top]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a table: .csv, .json or .parquet. [default: print]")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images that run together.")] = 32,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that read images. [default: as many as help]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps … [default: a GPU where there is one]")] = "auto",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe of a checkpoint (may be repeated)."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of a checkpoint's classes, one a line, in their order.")
    ] = None,
    allow_python: RunCodeOption = None,
) -> None:
    """Name the class of each image with a trained network, or its classes where it was trained for several labels.

    An image that cannot be read is a row with the reason and changes nothing about the others or the exit code.
    """
    # slow to import: torch
    from kw_lightning.cli.output import console
    from kw_lightning.inference import find_images, load, write_predictions, writer_of

    if output is not None:
        writer_of(output)  # before the work, not after it
    paths = find_images(images)
    classifier = load(
        model, overrides=changes or (), classes=_names(classes), allow_python=tuple(allow_python or ())
    ).to(_device(device))
    least = threshold if threshold is not None else 0.5 if classifier.saved.several and top is None else 0.0
    most = min(top or (len(classifier.classes) if classifier.saved.several else 1), len(classifier.classes))
    screen = console()
    bar = output is not None or not screen.is_terminal  # lines on a terminal show themselves how far it is
    predictions: list[Prediction] = []
    ended: BaseException | None = None
    try:
        workers = _workers(workers, len(paths))
        for prediction in _with_progress(classifier, paths, most, least, batch_size, workers, bar):
            predictions.append(prediction)
            if output is None:
                screen.print(_line(prediction, least), markup=False, highlight=False, soft_wrap=True)
    except (KeyboardInterrupt, RunError) as error:
        ended = error  # what was predicted until then is kept
        if children := getattr(signal, "SIGCHLD", None):  # not on Windows
            signal.signal(children, signal.SIG_DFL)  # torch's handler would raise for every process that ends now
    if output is not None and (predictions or ended is None):
        widest = max((len(prediction.top) for prediction in predictions), default=0)
        write_predictions(predictions, output, most if top is not None else max(widest, 1))
    told = _summary(predictions, len(paths), output)
    if isinstance(ended, KeyboardInterrupt):
        raise KeyboardInterrupt(f"Interrupted: {told}")
    typer.echo(told, err=True)
    if ended is not None:
        raise ended


def _with_progress(
    classifier: ImageClassifier, paths: list[Path], top: int, threshold: float, batch_size: int, workers: int, bar: bool
) -> Iterator[Prediction]:
    """Yield the predictions, with a bar on a terminal where it is wanted."""
    from kw_lightning.cli.output import counting

    with counting("predicting", len(paths), bar=bar) as advance:
        yield from classifier.stream(
            paths, top=top, threshold=threshold, batch_size=batch_size, workers=workers, advance=advance
        )


def _line(prediction: Prediction, threshold: float) -> str:
    named = "  ".join(f"{label} {score:.4f}" for label, score in prediction.top)
    return f"{prediction.path}  {named or prediction.problem or f'no class from {threshold:g} on'}"


def _summary(predictions: list[Prediction], images: int, output: Path | None) -> str:
    failed = sum(prediction.problem is not None for prediction in predictions)
    told = f"{len(predictions) - failed} of {images} images" + (f" -> {output}" if output and predictions else "")
    return told + (f"; {failed} failed, see their rows" if failed else "")


def _names(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RunError(f"--classes {file}: {reason}") from error


def _workers(wanted: int | None, images: int) -> int:
    import os

    if wanted is not None:
        return wanted
    return min(os.cpu_count() or 1, 8) if images >= WORKERS_FROM else 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else found.type
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"--device {name}: {first_line(error)}") from error
    return name
