"""Callbacks that a recipe names: made with their arguments where their code is allowed, their state kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.own_callbacks import own_callbacks
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

CODE = """
from pathlib import Path
from lightning.pytorch import Callback

Path(__file__).with_name("imported").touch()


class Counting(Callback):
    def __init__(self, start=0):
        self.count = start

    def on_train_batch_end(self, *given):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def nothing():
    return 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a module `team_callbacks` that says when it was imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/team_callbacks.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(__import__("sys").modules, "team_callbacks", raising=False)
    return tmp_path / "code"


def recipe(*callbacks: object) -> Recipe:
    return load_recipe({"kw": 1, "extends": "digits-resnet", "callbacks": list(callbacks)})


def test_without_permission_no_code_runs_and_one_message_says_how(code: Path, tmp_path: Path, quick: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"callbacks\[0\]: .*allow it by allow_python=\[.team_callbacks.\]") as caught:
        fit("digits-resnet", [*quick, "callbacks=['python:team_callbacks:Counting']"], output=tmp_path / "run")
    assert len(caught.value.problems) == 1
    assert not (code / "imported").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (["python:team_callbacks:Countin"], "cannot be imported"),
        ([{"python:team_callbacks:Counting": {"begin": 3}}], r"callbacks\[0\]: .*unexpected keyword argument 'begin'"),
        (["python:team_callbacks:nothing"], "gave a int, allowed: a Callback of Lightning"),
        (["python:team_callbacks:Counting"] * 2, r"callbacks\[1\]: found .*Counting\" twice"),
    ],
)
def test_what_is_no_callback_is_told_by_its_place(code: Path, callbacks: list[object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        own_callbacks(recipe(*callbacks), allow_python=["team_callbacks"])


@pytest.mark.parametrize("entry", ["team.callbacks:Mail", {"team:Mail": {}}, {"python:a:b": 3}, {}])
def test_other_entries_are_refused_by_the_language(entry: object) -> None:
    with pytest.raises(RecipeError, match=r"callbacks\[0\]"):
        recipe(entry)


def test_a_resume_takes_back_the_state(code: Path, tmp_path: Path, quick: list[str]) -> None:
    callbacks = "callbacks=[{'python:team_callbacks:Counting': {start: 100}}]"
    options = [*quick, "log.tensorboard=false", "train.schedule.name=constant", callbacks]
    fit("digits-resnet", [*options, "train.epochs=1"], output=tmp_path / "run", allow_python=["team_callbacks"])
    fit("digits-resnet", options, resume=tmp_path / "run", allow_python=["team_callbacks"])
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["callbacks"]["Counting"] == {"count": 106}
