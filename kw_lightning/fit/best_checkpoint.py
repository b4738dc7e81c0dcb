"""The checkpoint with the best monitored metric, which a run that goes on keeps wherever its folder is by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps one file, that of the best epoch.

    Lightning forgets how good it is where the folder has another name than before, and writes a worse one over it; and
    remembers it where the file is gone, so that none is chosen.

    Args:
        path: the file.
        monitor: the metric.
        mode: "min" or "max", whichever of it is better.
        chooses: whether there is a metric to choose by.
    """

    def __init__(self, path: Path, monitor: str, mode: str, *, chooses: bool = True) -> None:
        super().__init__(
            path.parent,
            filename=path.stem,
            monitor=monitor,
            mode=mode,
            save_top_k=int(chooses),
            enable_version_counter=False,
        )
        self._is_there = False

    @property
    def state_key(self) -> str:
        """Return Lightning's own: the state is that of its class."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @property
    def file(self) -> Path:
        """Return the file, in the folder as Lightning writes it."""
        assert self.dirpath is not None
        return Path(self.dirpath, f"{self.filename}{self.FILE_EXTENSION}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See whether the file is there, where the first process is."""
        super().setup(trainer, pl_module, stage)
        self._is_there = trainer.strategy.broadcast(self.file.is_file())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the file's metric as what is to be passed; without a file the epochs to come are compared alone."""
        if self._is_there and state_dict.get("best_k_models"):
            best, path = state_dict["best_model_score"], str(self.file)
            places = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            super().load_state_dict({**state_dict, **places, "best_k_models": {path: best}})
