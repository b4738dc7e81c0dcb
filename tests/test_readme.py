"""Every command and every Python block of the README runs as it stands.

Training is shortened by overrides that are appended here, `train.epochs=1` and fewer images, and `kw bench` runs once,
with two samples. The two commands that set the project up are run by `.ci/run`, and the study is started only.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from kw_lightning.cli import application

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = ["train.epochs=1", "temperature.epochs=0.5", "data.train.samples=40", "data.eval.samples=20"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
SET_UP = ["pip install . && kw-fit digits-resnet", "pip install '.[test]' && pytest -n 2 --dist loadfile"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after a clone, with the README's own recipe in it."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "schemas"):
        shutil.copytree(ROOT / name, path / name)
    (own,) = [block for block in blocks("yaml") if block.startswith("# net.yaml")]
    (path / "net.yaml").write_text(own, encoding="utf-8")
    (path / "pictures").mkdir()
    Image.new("L", (12, 10), 128).save(path / "pictures" / "digit.png")
    for name, colour in (("cat", "red"), ("dog", "green"), ("eel", "blue")):
        (path / "pets" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (24, 24), colour).save(path / "pets" / name / f"{number}.png")
    return path


def test_the_set_up_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("pip")] == SET_UP


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("pip")])
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    if program == "python":
        script, *options = arguments
        shorter = ["--help"] if script.startswith("recipes/studies/") else [*options, "--epochs", "1"]
        subprocess.run([sys.executable, script, *shorter], check=True, capture_output=True, timeout=250)
        return
    if "train.devices=2" in arguments:  # Lightning starts the second process by the command line of the first
        entry = str(Path(sys.executable).with_name(program))
        subprocess.run([entry, *arguments, *SHORTER], check=True, capture_output=True, timeout=250)
        return
    assert program in ("kw", "kw-fit")
    if program == "kw-fit":
        arguments = ["fit", *arguments, *([] if "--dry-run" in arguments else SHORTER)]
    if arguments[0] == "bench":
        arguments += ["--batch", "2", "--repeats", "1", "--no-reference"]
        if "--size" not in arguments and "deit-tiny-kw-1x" not in arguments:  # whose images have one size
            arguments += ["--size", "64"]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope.keys() & {"trainer", "logits", "result", "model"}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_the_table_of_results_is_the_study() -> None:
    """The README's figures are those of the recorded results, row by row."""
    import json
    import runpy

    if not (ROOT / "recipes/studies/digits.json").exists():
        pytest.skip("no recorded results of the study")
    study = runpy.run_path(str(ROOT / "recipes/studies/digits.py"))
    results = json.loads((ROOT / "recipes/studies/digits.json").read_text(encoding="utf-8"))
    assert study["table"](results) in README
