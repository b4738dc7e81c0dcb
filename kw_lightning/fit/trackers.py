"""Trackers that a run's metrics go to besides `metrics.csv`: TensorBoard, Weights & Biases, MLflow, and Trackio.

A run that goes on with its folder goes on in its tracker too: `trackers.json` in the folder holds the tracker's name
for it.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from kw_lightning.errors import KWError, RecipeError, RunError, first_line, mistake, needs
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.interruption import is_first_process
from kw_lightning.recipe.types import Recipe

log = logging.getLogger(__name__)

IDENTITIES = "trackers.json"
OURS = {"self", "experiment", "save_dir", "dir", "version", "id", "run_id", "name", "kwargs"}
"""Arguments that kw-fit gives, or that are Python objects."""
OF_WANDB = ("name", "entity", "group", "job_type", "notes", "tags")
"""What Lightning hands on to `wandb.init`."""


class TrackioLogger(Logger):
    """Lightning has none for Trackio, whose functions are those of wandb.

    Args:
        project: what the run is one of.
        name: of the run; one that is there is gone on with.
        space_id: a Space of the Hugging Face Hub that shows it; on this machine alone unless given.
    """

    def __init__(self, project: str, name: str, space_id: str | None = None) -> None:
        super().__init__()
        self.project, self.run, self.space_id = project, name, space_id
        self._begun: Any = None

    @property
    def name(self) -> str:
        """Return the project."""
        return self.project

    @property
    def version(self) -> str:
        """Return the run."""
        return self.run

    @property
    def experiment(self) -> Any:
        """Return Trackio's run, begun when it is first used."""
        if self._begun is None:
            import trackio

            space = {} if self.space_id is None else {"space_id": self.space_id}
            self._begun = trackio.init(project=self.project, name=self.run, resume="allow", embed=False, **space)
        return self._begun

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Show pictures, as pixels [height, width, 3], at a step."""
        import trackio

        for pixels in images:  # it takes no list of them
            self.experiment.log({key: trackio.Image(pixels)}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the recipe is in the run folder."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Hand over what is still to be written."""
        if self._begun is not None:
            self._begun.finish()
            self._begun = None


CLASSES: dict[str, type[Logger]] = {"wandb": WandbLogger, "mlflow": MLFlowLogger, "trackio": TrackioLogger}
"""The logger of each tracker, which is also the name of its package and of the extra."""


def check_trackers(recipe: Recipe) -> None:
    """Check that the trackers of a recipe take the arguments given.

    Raises:
        RecipeError: an argument that a logger does not have.
    """
    problems = []
    for name, arguments in recipe.log.trackers.items():
        own = [key for key in inspect.signature(CLASSES[name]).parameters if key not in OURS]
        allowed = [*own, *(OF_WANDB if name == "wandb" else ("name",) if name == "trackio" else ())]
        problems += [
            recipe.document.problem(f"log.{name}.{key}", mistake(key, allowed, what="the unknown argument"))
            for key in arguments
            if key not in allowed
        ]
    if problems:
        raise RecipeError(problems)


def writes_tensorboard(recipe: Recipe) -> bool:
    """Tell whether a run writes TensorBoard's events: where it is installed, unless the recipe says no.

    A recipe that asks for them goes on without as well, and a line says so.
    """
    if not recipe.log.tensorboard or find_spec("tensorboard") is not None:
        return recipe.log.tensorboard
    if dict(recipe.document.data.get("log") or {}).get("tensorboard") and is_first_process():
        log.warning("%s; going on without", needs("log.tensorboard", "tensorboard", "tensorboard"))
    return False


def check_installed(recipe: Recipe) -> None:
    """Check that the trackers of a recipe are installed.

    Raises:
        RunError: a package that is not.
    """
    for name in recipe.log.trackers:
        if find_spec(name) is None:
            raise RunError(needs(f"log.{name}", name, name))


def make_trackers(recipe: Recipe, folder: RunFolder) -> list[Logger]:
    """Return the loggers of a recipe's trackers, which write into the run folder where they write files.

    Raises:
        RunError: a tracker that cannot be reached, or does not take a value.
    """
    known = _identities(folder)
    loggers = []
    for tracker, arguments in recipe.log.trackers.items():
        try:
            logger, identity = _make(tracker, dict(arguments), folder, known.get(tracker))
        except KWError:
            raise
        except Exception as error:  # each tracker has errors of its own, for its network, its logins and its values
            raise RunError(f"log.{tracker}: {type(error).__name__}: {first_line(error)}") from error
        loggers.append(logger)
        if identity is not None:
            known[tracker] = identity
    if loggers and is_first_process():
        folder.write(IDENTITIES, json.dumps(known, indent=2) + "\n")
    return loggers


def end_trackers(recipe: Recipe) -> None:
    """End what Lightning leaves open: in a notebook the next run would go on in it."""
    for name in recipe.log.trackers.keys() & {"wandb", "trackio"}:
        module: Any = sys.modules.get(name)
        with suppress(RuntimeError):  # Trackio's own, where nothing is open
            if module is not None:
                module.finish()


def _make(tracker: str, given: dict[str, Any], folder: RunFolder, before: str | None) -> tuple[Logger, str | None]:
    """Return a tracker's logger, and the name under which it is gone on with."""
    path = folder.path.absolute()
    if tracker == "wandb":
        identity = before or uuid4().hex[:12]
        wandb = {"project": "kw_lightning", "name": path.name, **given}
        return WandbLogger(save_dir=path, id=identity, resume="allow", **wandb), identity
    if tracker == "mlflow":
        local = {} if "tracking_uri" in given else {"tracking_uri": f"sqlite:///{path / 'mlflow.db'}"}
        names = {"experiment_name": "kw_lightning", "run_name": path.name}
        if local:
            names["artifact_location"] = (path / "mlflow").as_uri()
        mlflow = MLFlowLogger(**{**names, **local, **given}, run_id=before)
        return mlflow, mlflow.run_id if is_first_process() else None
    trackio = {"project": "kw_lightning", "name": before or path.name, **given}
    return TrackioLogger(**trackio), trackio["name"]


def _identities(folder: RunFolder) -> dict[str, str]:
    try:
        found = json.loads((folder.path / IDENTITIES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
