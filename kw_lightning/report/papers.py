"""A network's attention as files for a paper and for programs: figure 3 of KernelWarehouse, for one's own network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kw_lightning.callbacks.figures import drawing
from kw_lightning.callbacks.heat_map import heat_map
from kw_lightning.errors import RunError, argument, mistake
from kw_lightning.fit.evaluation import evaluate_opened, open_checkpoint
from kw_lightning.fit.folder import RunFolder, folder_of, readable_errors
from kw_lightning.paths import user_path, whole
from kw_lightning.report.attention import Array, WarehouseAttention
from kw_lightning.report.charts import class_use_figure
from kw_lightning.report.observation import Observation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = ("svg", "pdf", "png")
DOTS_PER_INCH = 300
ARRAYS = "attention.npz"


@dataclass(frozen=True)
class Written:
    """The attention of a checkpoint over a part of its data, and where it was written.

    Attributes:
        folder: with `attention.npz` and the figures.
        checkpoint: the file.
        split: "train", "val" or "test".
        images: how many there were.
        warehouses: their attention.
        classes: their names.
    """

    folder: Path
    checkpoint: Path
    split: str
    images: int
    warehouses: tuple[WarehouseAttention, ...]
    classes: tuple[str, ...]


def write_attention(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    split: str | None = None,
    output: str | Path | None = None,
    allow_python: Sequence[str] = (),
) -> Written:
    """Pass data through a trained network and write what its attention does.

    Args:
        path: a run folder or a checkpoint.
        overrides: changes to the recipe inside, as `data.root=/elsewhere`.
        checkpoint: of a run folder, the name of one of its checkpoints, as "last"; the chosen one by default.
        split: "train", "val" or "test"; by default "test" where there is one, else "val".
        output: the folder; by default `attention/CHECKPOINT-SPLIT` in the run folder.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: no such checkpoint or data, a network without warehouses, **or** a folder that cannot be written.
        RecipeError: an override that cannot be used.
    """
    opened = open_checkpoint(_checkpoint(user_path(path), checkpoint), overrides, allow_python=allow_python)
    if not opened.module.plan.warehouses:
        raise RunError(f"{opened.checkpoint}: a static network; it has no warehouses and so no attention")
    watching = Observation(worst=0)
    measured = evaluate_opened(opened, split, [watching])
    if watching.observed is None:
        raise RunError(f"{opened.checkpoint}: its attention could not be measured") from watching.failure
    place = folder_of(opened.checkpoint).path / "attention" / f"{opened.checkpoint.stem}-{measured.split}"
    folder = user_path(output) if output is not None else place
    found, images = watching.observed.attention, watching.observed.images
    classes = opened.classes or tuple(str(entry["name"]) for entry in measured.classes)
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_arrays(folder / ARRAYS, found, classes)
        for name, figure in _figures(found, classes):
            _write_figure(folder, name, figure)
    return Written(folder, opened.checkpoint, measured.split, images, found, classes)


def _checkpoint(path: Path, name: str | None) -> Path:
    if name is None:
        return path
    if not path.is_dir():
        raise RunError(f"{argument('checkpoint', name)} names one of a run folder's, and {path} is no folder")
    named = RunFolder(path).checkpoints / f"{name.removesuffix('.ckpt')}.ckpt"
    if named.is_file():
        return named
    if user_path(name).is_file():
        return user_path(name)
    there = sorted(file.stem for file in RunFolder(path).checkpoints.glob("*.ckpt"))
    raise RunError(f"{path}: {mistake(name, there, what='the unknown checkpoint')}")


def _write_arrays(path: Path, found: Sequence[WarehouseAttention], classes: Sequence[str]) -> None:
    arrays: dict[str, Array] = {"classes": np.array(classes, dtype=str)}
    for warehouse in found:
        arrays |= {f"{warehouse.name}/{name}": array for name, array in warehouse.arrays().items()}
    with whole(path) as partial:
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]


def _figures(found: Sequence[WarehouseAttention], classes: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    for warehouse in found:
        name = re.sub(r"[^\w.-]", "_", warehouse.name).lstrip(".") or "warehouse"
        yield name, heat_map(warehouse.summary.mean, warehouse.shares, vector=True)
        if warehouse.class_use is not None and len(warehouse.class_use) > 1:
            yield f"{name}-classes", class_use_figure(warehouse, classes)


def _write_figure(folder: Path, name: str, figure: Figure) -> None:
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with drawing():
        for form in FORMS:
            with whole(folder / f"{name}.{form}") as partial:
                figure.savefig(partial, dpi=DOTS_PER_INCH, metadata=undated[form])
