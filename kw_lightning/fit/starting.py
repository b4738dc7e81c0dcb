"""Where a run starts: in a new folder, from a checkpoint, or over again where it ended before its first checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kw_lightning.errors import KWError, RunError, argument, first_line
from kw_lightning.fit.evaluation import read_checkpoint
from kw_lightning.fit.folder import RECIPE_FILE, RUNS, RunFolder, checkpoint_of, folder_of, new_folder, newest_folder
from kw_lightning.fit.interruption import is_first_process
from kw_lightning.paths import user_path
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

FOLDER_VARIABLE = "KW_RUN_FOLDER"
"""Tells the processes that Lightning starts for further devices where the run is."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: the run folder, claimed by the first process of the run.
        checkpoint: the file that the run goes on from, None for a new run.
        state: what is in it.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None


def start(recipe: Recipe, resume: str | Path | None, output: str | Path | None) -> Start:
    """Choose the run folder and the checkpoint to go on from, and claim the folder.

    Raises:
        RunError: no such checkpoint, a damaged one, the last or the best, **or** a folder that cannot be used.
    """
    folder, checkpoint, state = goes_on_from(recipe, resume, output)
    if not is_first_process():  # started by Lightning or by torchrun for another device: writes nothing
        path = os.environ.get(FOLDER_VARIABLE, RUNS / recipe.name)
        return Start(folder or RunFolder(Path(path)), checkpoint, state)
    if folder is None:
        folder = new_folder(recipe.name)
    else:
        goes_on = checkpoint is not None and folder_of(checkpoint).path == folder.path
        anew = resume == "auto" and checkpoint is None
        folder.claim(resume=goes_on or anew)
        if anew:
            begin_again(folder, recipe)
        elif goes_on:
            check_best(folder, alone=resume == "auto")
    os.environ[FOLDER_VARIABLE] = str(folder.path)
    return Start(folder, checkpoint, state)


def goes_on_from(
    recipe: Recipe, resume: str | Path | None, output: str | Path | None
) -> tuple[RunFolder | None, Path | None, dict[str, Any] | None]:
    """Return the folder, where that is known already, the checkpoint to go on from and what is in it.

    Raises:
        RunError: no such checkpoint, **or** a damaged one.
    """
    folder = RunFolder(user_path(output)) if output else None
    if resume == "auto":
        found = folder if folder is not None else newest_folder(recipe.name)
        good = last_good(found) if found is not None else None
        return (folder, None, None) if good is None else (found, *good)
    if resume is None:
        return folder, None, None
    checkpoint = checkpoint_of(user_path(resume))
    return folder or folder_of(checkpoint), checkpoint, read_checkpoint(checkpoint)


def last_good(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a folder that is whole, and what is in it; None where there is no checkpoint.

    Raises:
        RunError: every one is damaged.
    """
    problems: list[KWError] = []
    for path in _newest_first(folder):
        try:
            state = read_checkpoint(path)
        except RunError as error:
            problems.append(error)
            continue
        if problems:
            found = "; ".join(str(problem) for problem in problems)
            log.warning("%s. Going on from %s, step %d", found, path, state["global_step"])
        return path, state
    if problems:
        found = "; ".join(str(problem) for problem in problems)
        raise RunError(
            f"{found}. No good checkpoint is left; give another {argument('output')}, or remove {folder.path}"
        )
    return None


def _newest_first(folder: RunFolder) -> Iterator[Path]:
    if folder.last.exists():
        yield folder.last
    others = [path for path in folder.checkpoints.glob("*.ckpt") if path != folder.last]
    yield from sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def check_best(folder: RunFolder, *, alone: bool) -> None:
    """See that the best checkpoint of a run that goes on can be read: it may be the one that is chosen at the end.

    Args:
        folder: of the run.
        alone: whether a damaged one is put aside, so that the best is chosen anew, where nobody may be there to do it.

    Raises:
        RunError: it is damaged, and not put aside.
    """
    if not folder.best.is_file():
        return
    try:
        read_checkpoint(folder.best)
    except RunError as error:
        if not alone:
            folder.release()
            raise RunError(
                f"{error}. The run may choose it at its end: without that file, the best is chosen among the epochs to "
                f"come; {argument('resume', 'auto')} moves it away by itself"
            ) from error
        aside = folder.best.with_name(f"{folder.best.name}.damaged")
        folder.best.replace(aside)
        log.warning("%s. It is %s now, and the best is chosen among the epochs to come", error, aside.name)


def begin_again(folder: RunFolder, recipe: Recipe) -> None:
    """Empty the folder of a run of this recipe that ended before its first checkpoint; an empty one stays so.

    Raises:
        RunError: it holds a run of another recipe, **or** other files.
    """
    try:
        locked = folder.path / RECIPE_FILE
        if locked.exists() and load_recipe(locked).document.data != recipe.document.data:
            raise RunError(
                f"{folder.path} holds a run of another recipe, without a checkpoint. Give another folder by "
                f"{argument('output')}, or remove that one; kw diff {locked} RECIPE says what differs"
            )
        folder.empty()
    except BaseException:
        folder.release()
        raise


class Restoring(Callback):
    """Tells a checkpoint whose inside is not what `kw-fit` writes from whatever fails once training has begun.

    Args:
        checkpoint: the file that the run goes on from, None for a new run.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All of the checkpoint has been used."""
        self.checkpoint = None

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Turn what a checkpoint's content leads to into one message.

        Raises:
            RunError: in place of any error before training begins: a stranger's file can hold anything.
        """
        try:
            yield
        except (KWError, OSError):
            raise
        except Exception as error:
            if self.checkpoint is None:
                raise
            found = f"{type(error).__name__}: {first_line(error)}"
            raise RunError(
                f"{self.checkpoint} cannot be resumed: it is damaged, or was not written by kw-fit ({found}). "
                f"{argument('init', self.checkpoint)} begins a new run with its weights"
            ) from error
