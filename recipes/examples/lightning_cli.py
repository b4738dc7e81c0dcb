"""LightningCLI with KWCallback in its YAML; the model and the data are ordinary ones.

python recipes/examples/lightning_cli.py fit --config recipes/examples/lightning_cli.yaml
"""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI
from own_module import Digits

from kw_lightning import load_recipe
from kw_lightning.fit.data import ImageData


class DigitsData(ImageData):
    """The digits that ship with the package."""

    def __init__(self) -> None:
        super().__init__(load_recipe("digits-resnet"))


if __name__ == "__main__":
    LightningCLI(Digits, DigitsData)
