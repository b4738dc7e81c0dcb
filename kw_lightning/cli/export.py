"""`kw export`: a trained network as a file for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import ModelArgument, RunCodeOption
from kw_lightning.errors import RunError, mistake
from kw_lightning.paths import writable

if TYPE_CHECKING:
    from torch import nn

    from kw_lightning.inference import ImageClassifier, SavedNetwork

FOLDED = ("static", "int8")
FOLDERS = ("static", "int8-weights")
FORMS = ("onnx", "torch", "openvino", "executorch", "executorch-portable", *FOLDED, "int8-weights", "official")


def export(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=f"What to write: {', '.join(FORMS)}.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="PATH", help="A new file; of static, int8-weights a folder."),
    ],
    samples: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Of static and int8: training images over which attention is averaged."),
    ] = 512,
    epochs: Annotated[
        int, typer.Option("--fit", metavar="N", min=0, help="Of static and int8: epochs of training after folding.")
    ] = 0,
    allow_python: RunCodeOption = None,
) -> None:
    """Write a trained network as a file that another program reads.

    - onnx: for onnxruntime and others; batch and size are free, preprocessing and class names are in its metadata.
    - torch: PyTorch's exported program (.pt2), which does not need this package either.
    - openvino: OpenVINO's model (.xml and .bin), otherwise as onnx.
    - executorch: a program (.pte) for ExecuTorch and its XNNPACK backend, for one image of the usual size; its metadata
      is beside it, as .json.
    - executorch-portable: the same for builds of ExecuTorch without XNNPACK, where static networks are far slower.
    - static: a saved network of ordinary layers, each with its kernel at the mean attention; prints the accuracy that
      this costs. With --fit it is trained on, at a tenth of the learning rate.
    - int8: the static network as ONNX in whole numbers of eight bits; prints size and accuracy.
    - int8-weights: a saved network whose cells, attention and other matrices take eight bits in the file, and are
      computed with in single precision; prints size and accuracy.
    - official: a checkpoint in the layout of the paper's authors, for their networks.
    """
    if to not in FORMS:
        raise RunError(f"--to: {mistake(to, FORMS)}")
    if epochs and to not in FOLDED:
        raise RunError(f"--fit trains a folded network: --to {' or '.join(FOLDED)}")
    if output.exists():
        raise RunError(f"{output} is there already; give a path that is not")
    place = output
    if to in FOLDERS:  # which are made with what is above them
        place = next(parent for parent in output.absolute().parents if parent.exists()) / output.name
    with writable(place):
        pass  # whether it can be, before anything is computed
    # slow to import: torch
    from kw_lightning.inference import load

    packages = tuple(allow_python or ())
    classifier = load(model, allow_python=packages)
    free = ""
    if to == "official":
        from kw_lightning.inference.published import export_checkpoint

        export_checkpoint(classifier, output)
    elif to == "int8-weights":
        _packed(classifier, output, packages)
    elif to in FOLDED:
        _folded(classifier, output, samples, epochs, packages, eight_bits=to == "int8")
    else:
        from kw_lightning.export import write_executorch, write_onnx, write_openvino, write_program

        write: dict[str, Callable[[SavedNetwork, Path], str]] = {
            "onnx": write_onnx,
            "torch": write_program,
            "openvino": write_openvino,
            "executorch": write_executorch,
            "executorch-portable": partial(write_executorch, portable=True),
        }
        free = f"; free in it: {write[to](classifier.saved, output)}"
    typer.echo(f"Wrote {output}{free}", err=True)


def _folded(
    classifier: ImageClassifier,
    output: Path,
    samples: int,
    epochs: int,
    allow_python: tuple[str, ...],
    *,
    eight_bits: bool,
) -> None:
    """Fold a network over its recipe's training images, write it, and print what that costs."""
    from kw_lightning.export import fold, is_dynamic, needs_samples, read_onnx, tensor_bytes, tune, write_int8
    from kw_lightning.export.calibration import calibration_images
    from kw_lightning.inference import ImageClassifier

    saved = classifier.saved
    networks = {"dynamic": saved.network}
    folded = saved
    if is_dynamic(saved.network) or not eight_bits:
        images = calibration_images(saved, samples, allow_python=allow_python) if needs_samples(saved.network) else ()
        folded = fold(saved, images)
        networks["static"] = folded.network
    else:
        networks = {"static": saved.network}
    if epochs:
        folded = tune(folded, epochs, allow_python=allow_python)
        networks[f"static, {epochs} epoch{'s' if epochs > 1 else ''} on"] = folded.network
    sizes = {name: tensor_bytes(network) for name, network in networks.items()}
    if eight_bits:
        write_int8(folded, calibration_images(saved, samples, allow_python=allow_python), output)
        networks["int8"], sizes["int8"] = read_onnx(output).network, output.stat().st_size
    accuracies = _compared(saved, networks, sizes, allow_python)
    if not eight_bits:
        metrics = {"evaluation": {"accuracy": accuracies[-1]}}
        ImageClassifier(folded).save_pretrained(output, metrics=metrics)


def _packed(classifier: ImageClassifier, output: Path, allow_python: tuple[str, ...]) -> None:
    """Write a network with its weights in eight bits, and print what that saves and costs."""
    from kw_lightning.inference import load
    from kw_lightning.inference.saving import WEIGHTS

    whole, small = "float32", "int8 weights"
    classifier.save_pretrained(output, eight_bits=True)
    networks = {whole: classifier.network, small: load(output, allow_python=allow_python).network}
    with TemporaryDirectory() as folder:
        classifier.save_pretrained(folder)
        sizes = {name: (Path(place) / WEIGHTS).stat().st_size for name, place in ((whole, folder), (small, output))}
    _compared(classifier.saved, networks, sizes, allow_python)


def _compared(
    saved: SavedNetwork, networks: Mapping[str, nn.Module], sizes: Mapping[str, int], allow_python: tuple[str, ...]
) -> list[float]:
    """Print networks side by side, by their accuracy and size; return their accuracies."""
    from rich.table import Table

    from kw_lightning.cli.output import console
    from kw_lightning.export import compare
    from kw_lightning.export.calibration import evaluation_images

    images = evaluation_images(saved, allow_python=allow_python)
    found = compare(networks, images, len(saved.classes), several=saved.several)
    table = Table("accuracy", *networks)
    table.add_row("all images", *(f"{found[name].overall:.2%}" for name in networks))
    for index, label in enumerate(saved.classes):
        table.add_row(label, *(f"{found[name].classes[index]:.2%}" for name in networks))
    table.add_section()
    table.add_row("size", *(f"{sizes[name] / 1e6:.2f} MB" for name in networks))
    console().print(table)
    return [found[name].overall for name in networks]
