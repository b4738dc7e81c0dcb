"""Every command and every Python block of the README, the tutorials and the commands' pages runs as it stands.

They run in the order of the pages, in one folder. Training is shortened by overrides that are appended here,
`train.epochs=1` and fewer images, and `kw bench` runs once, with two samples. The two commands that set the project up
are run by `.ci/run`, and the study is started only.
"""

import json
import re
import runpy
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
PAGES = [
    "README.md",
    ".docs/tutorials/own_images.md",
    ".docs/tutorials/own_module.md",
    ".docs/tutorials/published.md",
    "kw_lightning/fit/README.md",
    "kw_lightning/inference/README.md",
    "kw_lightning/export/README.md",
    "kw_lightning/bench/README.md",
    "recipes/studies/README.md",
]
SHORTER = [
    "train.epochs=1",
    "temperature.epochs=0.5",
    "data.train.samples=40",
    "data.eval.samples=20",
    "log.report=false",
]
SET_UP = ["pip install . && kw-fit digits-resnet", "pip install '.[test]' && pytest -n 2 --dist loadfile"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def steps(page: str) -> list[tuple[str, str]]:
    """Return what a page lets its reader do, in order: commands one by one, blocks of Python, files to write."""
    found: list[tuple[str, str]] = []
    for language, block in re.findall(r"^```(bash|python|yaml)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
        if language == "bash":
            found += [("bash", line) for line in block.splitlines() if line and not line.startswith("#")]
        elif language == "python" or re.match(r"# \S+\.yaml$", block.partition("\n")[0]):
            found.append((language, block))
    return found


STEPS = [(page, *step) for page in PAGES for step in steps(page)]
SCOPES: dict[str, dict[str, Any]] = {page: {} for page in PAGES}
"""The names that the Python blocks of a page have in common, as in a notebook."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after a clone, with some images."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "schemas"):
        shutil.copytree(ROOT / name, path / name)
    (path / "pictures").mkdir()
    Image.new("L", (12, 10), 128).save(path / "pictures" / "digit.png")
    for name, colour in (("cat", "red"), ("dog", "green"), ("eel", "blue")):
        (path / "pets" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (24, 24), colour).save(path / "pets" / name / f"{number}.png")
    return path


def run_command(command: str) -> None:
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


def test_the_set_up_commands() -> None:
    found = [command for page in PAGES for _, command in steps(page) if command.startswith("pip")]
    assert found == SET_UP


@pytest.mark.parametrize(("page", "language", "step"), [step for step in STEPS if not step[2].startswith("pip")])
def test_step(page: str, language: str, step: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if language == "bash":
        run_command(step)
    elif language == "yaml":
        name = step.partition("\n")[0].removeprefix("# ")
        assert not Path(name).exists()
        Path(name).write_text(step, encoding="utf-8")
    else:
        before = set(SCOPES[page])
        exec(compile(step, page, "exec"), SCOPES[page])
        assert set(SCOPES[page]) - before  # each block makes something


def test_every_page_has_something_to_do() -> None:
    assert [page for page in PAGES if not steps(page)] == []
    languages = {language for _, language, _ in STEPS}
    assert languages == {"bash", "python", "yaml"}


def test_the_table_of_results_is_the_study() -> None:
    """The page's figures are those of the recorded results, row by row, and so are those of the README."""
    if not (ROOT / "recipes/studies/digits.json").exists():
        pytest.skip("no recorded results of the study")
    study = runpy.run_path(str(ROOT / "recipes/studies/digits.py"))
    results = json.loads((ROOT / "recipes/studies/digits.json").read_text(encoding="utf-8"))
    table = study["table"](results)
    assert table in text_of("recipes/studies/README.md")
    fashion = runpy.run_path(str(ROOT / "recipes/studies/fashion.py"))
    study = fashion["Study"](ROOT / "recipes/studies/fashion.json", fashion["Length"](), "", ["cpu"])
    tables = [fashion["table"](study, network, fashion["SEEDS"]) for network in fashion["NETWORKS"]]
    assert [table for table in tables if table.partition("\n\n")[2] not in text_of("recipes/studies/README.md")] == []
    assert fashion["judged"](study, fashion["SEEDS"]) in text_of("recipes/studies/README.md")
    short = text_of("README.md").partition("## Does it work?")[2].partition("##")[0]
    figures = re.findall(r"\d\d\.\d\d ± \d\.\d\d", short)
    assert len(figures) == 12
    assert [figure for figure in figures if figure not in "".join(tables)] == []
    starts = runpy.run_path(str(ROOT / "recipes/studies/warm_start.py"))
    results = json.loads((ROOT / "recipes/studies/warm_start.json").read_text(encoding="utf-8"))
    assert starts["table"](results) in text_of("recipes/studies/README.md")
