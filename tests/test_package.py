"""The package: its public names, and a wheel that works away from the checkout."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kw_lightning

ROOT = Path(__file__).parents[1]


def run(
    *arguments: str, folder: Path, path: str | None = None, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {}), **(more or {})}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_public_names_load_at_first_use() -> None:
    assert len(kw_lightning.__all__) <= 12
    for name in kw_lightning.__all__:
        assert getattr(kw_lightning, name).__name__ == name
        assert name in dir(kw_lightning)
    assert not {"Any", "import_module"} & {*dir(kw_lightning)}  # what completion offers
    with pytest.raises(AttributeError, match="no attribute 'KWConv4d'"):
        _ = kw_lightning.KWConv4d


def test_recipes_are_read_without_torch(tmp_path: Path) -> None:
    script = "import sys, kw_lightning as kw; kw.load_recipe('digits-resnet'); print('torch' in sys.modules)"
    result = run("-c", script, folder=tmp_path)
    assert result.stdout.strip() == "False", result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    result = run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), folder=out)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = out.glob("*.whl")
    return found


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *itertools.chain.from_iterable(project["optional-dependencies"].values())]
    declared = {re.split(r"[\[<>=~ ]", name)[0] for name in names}
    core = {re.split(r"[\[<>=~ ]", name)[0] for name in project["dependencies"]}
    distributions = metadata.packages_distributions()
    undeclared = set()
    for file in (ROOT / "kw_lightning").rglob("*.py"):
        tree = ast.parse(file.read_text())
        always = {id(statement) for statement in tree.body}
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Import):
                modules = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                modules = [statement.module or ""]
            else:
                continue
            for module in {module.partition(".")[0] for module in modules}:
                # of an extra that is not installed, the package is taken to be called as its module
                found = {name.lower().replace("_", "-") for name in distributions.get(module, (module,))}
                missing = not found & {name.lower() for name in (core if id(statement) in always else declared)}
                if (
                    module not in {*sys.stdlib_module_names, "kw_lightning", "triton"} and missing
                ):  # torch brings triton
                    undeclared.add((str(file.relative_to(ROOT)), module))
    assert not undeclared


def test_what_is_declared_is_locked() -> None:
    """Where this fails, `.ci/lock` brings .ci/requirements.txt up to date (pip install uv)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / ".ci/requirements.txt").read_text().splitlines()
    locked = dict(line.partition(" ;")[0].split("==") for line in lines if re.match(r"[a-z]", line))
    extras, waiting = project["optional-dependencies"], [*project["dependencies"]]
    wanted: dict[str, Requirement] = {}
    waiting += extras["dev"]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == "kw-lightning":
            waiting += itertools.chain.from_iterable(extras[extra] for extra in requirement.extras)
        else:
            wanted[requirement.name.lower()] = requirement
    assert [name for name in wanted if name not in locked] == []
    assert [str(need) for name, need in wanted.items() if not need.specifier.contains(locked[name].strip())] == []


def test_wheel_holds_what_is_read_at_run_time(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "kw_lightning/py.typed",
        "kw_lightning/schemas/recipe-1.schema.json",
        "kw_lightning/schemas/recipe-1.editor.schema.json",
        "kw_lightning/recipes/digits-resnet.yaml",
        "kw_lightning/fit/data/digits.npz",
        "kw_lightning/fit/data/digits.md",
        "kw_lightning/nn/engine/native/tiles.h",
        "kw_lightning/nn/engine/native/mix_kernels.c",
        *(f"kw_lightning/report/page.{ending}" for ending in ("html", "css", "js")),
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed alone into an empty folder that comes before everything else; torch stays where it is.

    It trains where there is no compiler, and says so in a line.
    """
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = run(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(site),
        str(wheel),
        folder=elsewhere,
    )
    assert installed.returncode == 0, installed.stderr
    where = run("-c", "import kw_lightning; print(kw_lightning.__file__)", folder=elsewhere, path=str(site))
    assert where.stdout.startswith(str(site))
    command = ("-m", "kw_lightning")
    listed = run(*command, "list", folder=elsewhere, path=str(site))
    assert "digits-resnet" in listed.stdout
    planned = run(*command, "plan", "digits-resnet", "--json", folder=elsewhere, path=str(site))
    assert json.loads(planned.stdout)["parameters"] == {"static": 72_890, "kw": 103_762}
    quick = [
        "train.epochs=1",
        "temperature.epochs=0.5",
        "data.train.samples=40",
        "data.eval.samples=20",
        "log.report=false",
    ]
    bare = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    trained = run(*command, "fit", "digits-resnet", *quick, folder=elsewhere, path=str(site), more=bare)
    assert trained.returncode == 0, trained.stderr
    (line,) = trained.stderr.splitlines()
    assert line.startswith("the compiled passes are not in use: no C compiler found")
    assert (elsewhere / "runs/digits-resnet-1/checkpoints/last.ckpt").exists()


def test_a_source_tree_that_is_not_installed_knows_its_version(tmp_path: Path) -> None:
    places = [str(found.locate_file("")) for found in metadata.distributions(name="kw-lightning")]
    script = (
        f"import sys; sys.path = [{str(ROOT)!r}, *(path for path in sys.path if path not in {places})]; "
        "from kw_lightning.versions import version_of; print(version_of('kw-lightning'))"
    )
    found = run("-c", script, folder=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found.stdout.strip() == project["version"], found.stderr


def rows_of_rooms() -> list[list[str]]:
    """Return the rows of the drawing in CONTRIBUTING, each with its rooms, from the top down."""
    page = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    drawing = page.partition("## The rooms of the package")[2].partition("```text\n")[2].partition("```")[0]
    rows = drawing.replace("\n ↓\n", "\n\n").split("\n\n")
    return [[word for line in row.splitlines() for word in re.split(r"\s{3,}", line)[0].split()] for row in rows]


def test_rooms_import_only_from_those_below_them_in_the_drawing() -> None:
    rows = rows_of_rooms()
    place = {room: index for index, row in enumerate(rows) for room in row if room != "⇄"}
    joined = {room for row in rows if "⇄" in row for room in row}
    package = ROOT / "kw_lightning"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(place)
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        for statement in ast.walk(ast.parse(file.read_text())) if room in place else ():
            if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("kw_lightning"):
                continue
            inner = (statement.module or "").split(".")[1:]
            for other in inner[:1] or [alias.name for alias in statement.names if alias.name in place]:
                below = place[other] > place[room] or other == room or {other, room} <= joined
                assert below, f"{file.relative_to(ROOT)} imports {other}"
