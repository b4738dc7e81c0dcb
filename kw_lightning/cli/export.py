"""`kw export`: a trained network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.errors import RunError, mistake

if TYPE_CHECKING:
    from kw_lightning.inference import ImageClassifier

FORMS = ("onnx", "torch", "static", "official")


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, a saved network or hf://ORG/NAME@REV.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=f"What to write: {', '.join(FORMS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="A new file; of static a new folder.")],
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of static: training images over which attention is averaged.")
    ] = 512,
    allow_python: Annotated[list[str] | None, package_option("Let the recipe run code")] = None,
) -> None:
    """Write a trained network as a file that another program reads.

    onnx: for onnxruntime and others, batch and size free, preprocessing and class names in its metadata.
    torch: PyTorch's exported program (.pt2), which needs nothing of this package either.
    static: a saved network of ordinary layers, each with its kernel at the mean attention; the accuracy that this
    costs on the recipe's evaluation images is printed.
    official: a checkpoint in the layout of the paper's authors, for their networks.
    """
    if to not in FORMS:
        raise RunError(f"--to: {mistake(to, FORMS)}")
    if output.exists():
        raise RunError(f"{output} is there already; give a path that is not")
    # slow to import: torch
    from kw_lightning.inference import load

    packages = tuple(allow_python or ())
    classifier = load(model, allow_python=packages)
    if to == "official":
        from kw_lightning.inference.published import export_checkpoint

        export_checkpoint(classifier, output)
        free = ""
    elif to == "static":
        _static(classifier, output, samples, packages)
        free = ""
    else:
        from kw_lightning.export import write_onnx, write_program

        free = f"; free in it: {(write_onnx if to == 'onnx' else write_program)(classifier.saved, output)}"
    typer.echo(f"Wrote {output}{free}", err=True)


def _static(classifier: ImageClassifier, output: Path, samples: int, allow_python: tuple[str, ...]) -> None:
    """Fold a network over its recipe's training images, write it, and print what that costs."""
    from rich.table import Table

    from kw_lightning.cli.output import console
    from kw_lightning.export import compare, fold
    from kw_lightning.export.calibration import calibration_images, evaluation_images
    from kw_lightning.inference import ImageClassifier

    saved = classifier.saved
    folded = fold(saved, calibration_images(saved, samples, allow_python=allow_python))
    networks = {"dynamic": saved.network, "static": folded.network}
    found = compare(
        networks, evaluation_images(saved, allow_python=allow_python), len(saved.classes), several=saved.several
    )
    table = Table("accuracy", *networks)
    table.add_row("all images", *(f"{found[name].overall:.2%}" for name in networks))
    for index, label in enumerate(saved.classes):
        table.add_row(label, *(f"{found[name].classes[index]:.2%}" for name in networks))
    console().print(table)
    ImageClassifier(folded).save_pretrained(output, metrics={"evaluation": {"accuracy": found["static"].overall}})
