"""`kw_lightning.load`: a network that predicts, from a run, a checkpoint, a saved folder or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError, mistake
from kw_lightning.fit.folder import EXPORTED, RunFolder
from kw_lightning.inference import hub
from kw_lightning.inference.checkpoint import load_trained
from kw_lightning.inference.classifier import ImageClassifier
from kw_lightning.inference.saving import CONFIG
from kw_lightning.paths import user_path

MODEL = "model"
"""The saved network's folder inside a run folder."""
LAST = Path("checkpoints", "last.ckpt")
"""The newest checkpoint inside a run folder, for messages."""
ARGUMENTS = ("overrides", "classes", "allow_python")
"""Of `load`, wherever a network is; for messages."""
ELSEWHERE = {".pt2": "torch.export.load", ".pte": "ExecuTorch's runtime"}
"""Files of `kw export` that others run."""
LOADED = "a run, a checkpoint, a saved network, an ONNX or OpenVINO file or hf://… can be loaded"


def load(
    source: str | Path,
    *,
    overrides: Sequence[str] = (),
    classes: Sequence[str] = (),
    allow_python: Sequence[str] = (),
    **options: Any,
) -> ImageClassifier:
    """Return a trained network with its preprocessing and class names; no code of the source is run.

    Args:
        source: a run folder, a checkpoint file, a saved network's folder, an ONNX or OpenVINO file of `kw export`,
            or `hf://organisation/name@revision`.
        overrides: changes to the recipe of a checkpoint, as `model.backbone=torchvision/resnet18` of one of a
            LightningModule with KWCallback whose recipe names no network.
        classes: names of the outputs, of a checkpoint that has none.
        allow_python: packages whose code the recipe may name.
        **options: for the Hub alone, see `ImageClassifier.from_pretrained`.

    Raises:
        RunError: nothing there that can be loaded, **or** something changed or damaged.
        RecipeError: a recipe that cannot be used here.
        TypeError: options for the Hub of what is not there.

    Example:
        >>> kw_lightning.load("runs/pets-1").predict("cat.jpg").label
        'cat'
    """
    if options and not str(source).startswith(hub.PREFIX):
        raise TypeError(mistake(next(iter(options)), ARGUMENTS, what="the unknown argument"))
    if overrides or classes:
        path = user_path(source)
        if not path.is_file() and (path / LAST).is_file():
            path = path / LAST
        exported = path.suffix.lower() in EXPORTED
        if exported or path.is_dir() or str(source).startswith(hub.PREFIX):
            raise RunError(f"{source}: changes and names of classes are for checkpoints; what is saved has its own")
        if not path.is_file():
            raise RunError(f"{path}: no such file or folder; a run or a checkpoint is needed")
        return load_trained(path, overrides=overrides, classes=classes, allow_python=allow_python)
    if str(source).startswith(hub.PREFIX):
        return ImageClassifier.from_pretrained(str(source), allow_python=allow_python, **options)
    path = user_path(source)
    for folder in (path, path / MODEL):
        if (folder / CONFIG).is_file():
            return ImageClassifier.from_pretrained(folder, allow_python=allow_python)
    if path.suffix.lower() == ".onnx" and path.is_file():
        from kw_lightning.export.reading import read_onnx  # slow to import: onnxruntime

        return ImageClassifier(read_onnx(path))
    if path.suffix.lower() == ".xml" and path.is_file():
        from kw_lightning.export.openvino import read_openvino  # slow to import: openvino

        return ImageClassifier(read_openvino(path))
    if path.suffix.lower() in ELSEWHERE and path.is_file():
        raise RunError(f"{path}: a file for {ELSEWHERE[path.suffix.lower()]}; {LOADED}")
    checkpoint = path if path.is_file() else RunFolder(path).chosen
    if not checkpoint.is_file():
        there = "no such file or folder" if not path.exists() else f"neither a saved network nor {LAST} in this folder"
        raise RunError(f"{path}: {there}; {LOADED}")
    return load_trained(checkpoint, allow_python=allow_python)
