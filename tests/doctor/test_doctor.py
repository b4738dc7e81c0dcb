"""`kw doctor`: a machine and a run as they have to be, and what it says where they are not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.fit import fit
from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.native import library

sys.path.append(str(Path(__file__).parents[1] / "fit"))

from quick_run import QUICK


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(application(), ["doctor", *arguments, "--json"])
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    return result.exit_code, found["findings"]


def amiss(findings: dict[str, Any]) -> dict[str, str]:
    return {subject: one["found"] for subject, one in findings.items() if one["amiss"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("digits-resnet", QUICK, output=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_a_machine_with_a_compiler_has_nothing_amiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, findings = doctor()
    assert (code, amiss(findings)) == (0, {})
    assert findings["torch"]["found"] == torch.__version__.split("+")[0]
    assert findings["compiled passes"]["found"] == str(native.status())
    assert str(tmp_path) in findings["cache folder"]["found"]
    assert f"{torch.get_num_threads()} threads" in findings["cpu"]["found"]


def test_a_machine_says_why_the_passes_are_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kw_lightning").mkdir()
    (tmp_path / "kw_lightning").chmod(0o777)
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere", "CC": ""}.items():
        monkeypatch.setenv(name, value)
    library.find.cache_clear()
    code, findings = doctor()
    library.find.cache_clear()
    assert code == 1
    assert amiss(findings).keys() == {"compiler", "compiled passes", "cache folder"}
    assert "no C compiler found" in findings["compiled passes"]["found"]
    assert "can be written by others" in findings["cache folder"]["found"]


def test_a_run_that_ended_has_nothing_amiss(run: Path) -> None:
    code, findings = doctor(str(run))
    assert (code, amiss(findings)) == (0, {})
    assert findings["versions.json"]["found"] == "the same as here"
    assert findings["checkpoints/last.ckpt, numbers"]["found"] == "finite"
    assert findings["checkpoints/last.ckpt, temperature"]["found"] == "0, as the recipe ends"
    text = CliRunner().invoke(application(), ["doctor", str(run)]).stdout
    assert text.splitlines()[-1] == "nothing amiss"


def changed_checkpoint(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = run / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def first_cells(state: dict[str, Any]) -> str:
    return next(key for key in state["state_dict"] if key.endswith("cells"))


def spoil(state: dict[str, Any]) -> None:
    state["state_dict"][first_cells(state)].view(-1)[3] = torch.nan
    next(iter(state["optimizer_states"][0]["state"].values()))["exp_avg"].fill_(torch.inf)


def warm(state: dict[str, Any]) -> None:
    for key, value in state["state_dict"].items():
        if key.endswith("temperature"):
            value.fill_(0.25)


def shrink(state: dict[str, Any]) -> None:
    state["state_dict"][first_cells(state)] = torch.zeros(2, 2)


def rename(state: dict[str, Any]) -> None:
    state["hyper_parameters"]["recipe"]["description"] = "another"


@pytest.mark.parametrize(
    ("change", "subject", "found"),
    [
        (spoil, "checkpoints/last.ckpt, numbers", "optimizer_states.0.state.0.exp_avg"),
        (warm, "checkpoints/last.ckpt, temperature", "0 is not reached"),
        (shrink, "checkpoints/last.ckpt", "do not fit"),
        (rename, "checkpoints/last.ckpt, recipe", "another one than in recipe.lock.yaml"),
        (lambda state: state.pop("state_dict"), "checkpoints/last.ckpt", "no weights inside"),
    ],
    ids=["numbers", "temperature", "shapes", "recipe", "parts"],
)
def test_what_is_wrong_in_a_checkpoint_is_named(
    change: Callable[[dict[str, Any]], None], subject: str, found: str, run: Path
) -> None:
    changed_checkpoint(run, change)
    code, findings = doctor(str(run))
    assert code == 1
    assert amiss(findings).keys() == {subject}
    assert found in findings[subject]["found"]


@pytest.mark.parametrize(
    ("file", "damage", "found"),
    [
        ("recipe.lock.yaml", lambda text: text.replace(b"epochs: 2", b"epochs: 3"), "changed after it was locked"),
        ("recipe.lock.yaml", lambda _: b"\xff", ""),
        ("versions.json", lambda text: text[:20], "damaged"),
        ("metrics.csv", lambda text: text.replace(b"0.", b"nan", 1), ""),
        ("result.json", lambda text: text.replace(b"0.", b"NaN, 0.", 1), "damaged"),
        ("result.json", None, "has not ended"),
        ("checkpoints/last.ckpt", lambda content: content[:-99], "damaged"),
        ("checkpoints/last.ckpt", lambda content: content[:9999] + b"\1\2\3" + content[10002:], "damaged"),
        ("checkpoints/best.ckpt", None, "is not there"),
    ],
)
def test_damaged_and_missing_files_are_named(
    file: str, damage: Callable[[bytes], bytes] | None, found: str, run: Path
) -> None:
    if damage is None:
        (run / file).unlink()
    else:
        content = (run / file).read_bytes()
        (run / file).write_bytes(damage(content))
        assert (run / file).read_bytes() != content
    code, findings = doctor(str(run))
    assert code == 1
    assert amiss(findings).keys() == {file}
    assert found in findings[file]["found"]
    assert findings[file]["found"].isprintable()


@pytest.mark.parametrize("name", ["nowhere", "empty", "x" * 300])
def test_what_is_no_run_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(application(), ["doctor", str(tmp_path / name)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
