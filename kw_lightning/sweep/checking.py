"""All recipes of a grid against their networks and their data, before the first run starts."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.fit.classes import resolved
from kw_lightning.fit.failures import readable_failures
from kw_lightning.fit.run import check_training, make_parts
from kw_lightning.fit.trackers import check_installed
from kw_lightning.nn.adapter import count_trainable
from kw_lightning.planning import plan
from kw_lightning.recipe import Recipe
from kw_lightning.recipe.locking import content_hash
from kw_lightning.sweep.folder import Entry
from kw_lightning.sweep.grid import Row
from kw_lightning.sweep.loading import each


def check_rows(rows: Sequence[Row], recipes: Sequence[Recipe], *, allow_python: Sequence[str] = ()) -> list[Entry]:
    """Compare every recipe with its network and its data, as kw-fit does before it trains.

    Returns:
        What the sweep keeps of each row.

    Raises:
        RecipeError: every mistake of every row, each once.
        RunError: data or weights that are not there.
    """
    pairs = dict(zip(rows, recipes, strict=True))
    return each(rows, lambda row: check_row(row, pairs[row], allow_python))


def check_row(row: Row, recipe: Recipe, allow_python: Sequence[str]) -> Entry:
    """Check one recipe.

    Raises:
        RecipeError: whatever in the recipe cannot be used.
        RunError: data or weights that are not there.
    """
    check_training(recipe)
    check_installed(recipe)
    with readable_failures():
        known = resolved(recipe, allow_python=allow_python)
        planned = plan(known, allow_python=allow_python)
        module, _, _ = make_parts(planned.recipe, planned, pretrained=False, allow_python=allow_python)
    return Entry(
        name=row.name,
        settings=dict(row.settings),
        recipe=row.recipe,
        changes=row.changes,
        content=content_hash(recipe.document.data),
        parameters=planned.parameters.kw,
        multiply_adds=None if planned.macs is None else planned.macs.kw,
        trainable=count_trainable(module.network)[0],
    )
