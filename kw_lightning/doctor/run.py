"""The files of a run: whether they are whole, belong together, and hold a network that is trained to its end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kw_lightning.doctor.findings import Finding
from kw_lightning.errors import KWError, RecipeError, RunError, first_line, listed
from kw_lightning.fit.evaluation import load_classifier, read_checkpoint
from kw_lightning.fit.folder import RECIPE_FILE, RunFolder, versions
from kw_lightning.fit.metrics import parse_metrics
from kw_lightning.nn import warehouses
from kw_lightning.paths import partial_of, user_path
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.types import Recipe
from kw_lightning.recipe.variables import escape

WEIGHTS = ("state_dict", "current_model_state", "optimizer_states")
"""The parts of a checkpoint whose numbers have to be finite; the second holds the weights beside their average."""
SHOWN = 3


def examine_run(path: str | Path, *, allow_python: Sequence[str] = ()) -> list[Finding]:
    """Look at every file of a run folder.

    Args:
        path: the folder.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: there is no such folder, **or** it is none of a run.
    """
    folder = RunFolder(user_path(path))
    if not folder.path.is_dir():
        raise RunError(f"{folder.path}: there is no such folder; a run folder is needed")
    if not (folder.path / RECIPE_FILE).is_file() and not folder.last.is_file():
        raise RunError(f"{folder.path} is no run folder: it holds neither {RECIPE_FILE} nor checkpoints/last.ckpt")
    found, recipe = _recipe(folder.path / RECIPE_FILE)
    findings = [found, _versions(folder), _metrics(folder), _result(folder)]
    for name, file in (("last.ckpt", folder.last), ("best.ckpt", folder.best)):
        findings += _checkpoint(f"checkpoints/{name}", file, recipe, allow_python)
        if partial_of(file).exists():
            findings.append(Finding(f"checkpoints/{partial_of(file).name}", "left by a run that was killed"))
    return findings


def _recipe(file: Path) -> tuple[Finding, Recipe | None]:
    try:
        recipe = load_recipe(file)  # compares the hash of a lock
    except RecipeError as error:
        return Finding(RECIPE_FILE, first_line(error), amiss=True), None
    return Finding(RECIPE_FILE, f"{recipe.name}, content hash {_hash(recipe)[:12]}…"), recipe


def _hash(recipe: Recipe) -> str:
    return content_hash(escape(recipe.document.data))


def _versions(folder: RunFolder) -> Finding:
    then = _read_json(folder.path / "versions.json")
    if isinstance(then, str):
        return Finding("versions.json", then, amiss=True)
    here = json.loads(versions())
    changed = [
        f"{name} {then.get(name, 'missing')} (here {here.get(name, 'missing')})"
        for name in sorted({*then, *here})
        if then.get(name) != here.get(name)
    ]
    return Finding("versions.json", f"made with {', '.join(changed)}" if changed else "the same as here")


def _metrics(folder: RunFolder) -> Finding:
    file = folder.path / "metrics.csv"
    if not file.is_file():
        return Finding(file.name, "is not there", amiss=True)
    try:
        rows, damaged = parse_metrics(file)
    except OSError as error:
        return Finding(file.name, f"damaged: {first_line(error)}", amiss=True)
    if damaged:
        return Finding(file.name, f"damaged: {damaged} of {damaged + len(rows) + 1} lines are no rows", amiss=True)
    wrong = sorted({str(key) for row in rows for key, value in row.items() if not _is_finite(value)})
    if wrong:
        return Finding(file.name, f"not finite, or no number: {listed(wrong, SHOWN)}", amiss=True)
    return Finding(file.name, f"{len(rows)} rows", amiss=not rows)


def _result(folder: RunFolder) -> Finding:
    result = _read_json(folder.path / "result.json")
    if isinstance(result, str):
        more = f"; the run has not ended: kw-fit RECIPE --resume {folder.path} goes on"
        hint = more if result == "is not there" else ""
        return Finding("result.json", f"{result}{hint}", amiss=True)
    if not isinstance(result.get("parameters"), int):
        return Finding("result.json", "damaged: it does not hold what kw-fit writes", amiss=True)
    found = dict(_figures(result))
    wrong = [key for key, value in found.items() if not _is_finite(value)]
    if wrong:
        return Finding("result.json", f"not finite, or no number: {listed(wrong, SHOWN)}", amiss=True)
    return Finding("result.json", ", ".join(f"{key} {value:.4g}" for key, value in found.items()) or "nothing measured")


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield `val/accuracy, best` and the like with its value."""
    for part in ("val", "test"):
        checkpoints = result.get(part, {})
        for name, metrics in checkpoints.items() if isinstance(checkpoints, Mapping) else ():
            for key, value in metrics.items() if isinstance(metrics, Mapping) else ():
                yield f"{part}/{key} of {name}", value


def _checkpoint(name: str, file: Path, recipe: Recipe | None, allow_python: Sequence[str]) -> Iterator[Finding]:
    """Yield what one checkpoint is: its checksums, its recipe, shapes, numbers and temperature."""
    if not file.is_file():
        yield Finding(name, "is not there", amiss=True)
        return
    try:
        state = read_checkpoint(file)
        module = load_classifier(state, file, allow_python=allow_python)
    except KWError as error:
        yield Finding(name, first_line(error), amiss=True)
        return
    except (KeyError, TypeError, AttributeError) as error:  # it is whole, and has other parts than kw-fit writes
        yield Finding(name, f"not as kw-fit writes it: {type(error).__name__} {first_line(error)}", amiss=True)
        return
    yield Finding(name, f"whole, {len(state['state_dict'])} tensors of the shapes of {module.recipe.name}")
    if recipe is not None and _hash(module.recipe) != _hash(recipe):
        yield Finding(f"{name}, recipe", f"another one than in {RECIPE_FILE}", amiss=True)
    wrong = [place for part in WEIGHTS for place in _not_finite(state.get(part), part)]
    yield Finding(f"{name}, numbers", f"not finite: {listed(wrong, SHOWN)}" if wrong else "finite", amiss=bool(wrong))
    end = module.recipe.temperature.end
    reached = {name: float(one.temperature) for name, one in warehouses(module.network).items()}
    away = [f"{name} {value:.3g}" for name, value in reached.items() if not math.isclose(value, end, abs_tol=1e-6)]
    if reached:
        found = f"{end:g} is not reached: {listed(away, SHOWN)}" if away else f"{end:g}, as the recipe ends"
        yield Finding(f"{name}, temperature", found, amiss=bool(away))


def _not_finite(value: Any, place: str) -> Iterator[str]:
    """Yield the places of tensors that hold infinite numbers, or none."""
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all()):
            yield place
    elif isinstance(value, Mapping | list | tuple):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _not_finite(child, f"{place}.{key}")


def _read_json(file: Path) -> dict[str, Any] | str:
    """Return the object of a JSON file, or in a line why there is none."""
    if not file.is_file():
        return "is not there"
    try:
        data = json.loads(file.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError, OSError) as error:
        return f"damaged: {first_line(error)}"
    return data if isinstance(data, dict) else "damaged: it holds no object"


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
