"""Checkpoints of strangers: evaluating one opens no file that it names, and fetches nothing on its own account."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kw_lightning import load_recipe
from kw_lightning.errors import RunError
from kw_lightning.fit import Classifier, evaluate
from kw_lightning.recipe.variables import escape


def stranger(folder: Path, recipe: Any) -> Path:
    path = folder / "stranger.ckpt"
    torch.save({"epoch": 0, "state_dict": {}, "hyper_parameters": {"recipe": recipe}}, path)
    return path


def test_a_text_in_place_of_the_recipe_is_not_opened(tmp_path: Path) -> None:
    other = tmp_path / "secret.yaml"
    other.write_text("kw: 1\nextends: digits-resnet\n")
    with pytest.raises(RunError, match="no recipe inside"):
        evaluate(stranger(tmp_path, str(other)))
    with pytest.raises(TypeError, match="found a str"):
        Classifier(str(other))  # type: ignore[arg-type]


def test_evaluating_downloads_nothing_and_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was begun")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    root = tmp_path / "elsewhere"
    changes = ["data.name=mnist", "data.args={download: true}", f"data.root={root}"]
    module = Classifier(load_recipe("digits-resnet-static", changes))
    path = tmp_path / "stranger.ckpt"
    recipe = escape(module.recipe.document.data)
    torch.save(
        {"epoch": 0, "global_step": 0, "state_dict": module.state_dict(), "hyper_parameters": {"recipe": recipe}}, path
    )
    with pytest.raises(RunError, match="mnist is not in"):
        evaluate(path)
    assert not root.exists()
