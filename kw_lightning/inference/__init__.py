"""Trained networks at work: saved as a folder, loaded from anywhere, asked about images. Runs no code from a file."""

from kw_lightning.inference.classifier import ImageClassifier
from kw_lightning.inference.images import find_images
from kw_lightning.inference.loading import load
from kw_lightning.inference.prediction import Prediction, write_predictions, writer_of
from kw_lightning.inference.saving import SavedNetwork

__all__ = [
    "ImageClassifier",
    "Prediction",
    "SavedNetwork",
    "find_images",
    "load",
    "write_predictions",
    "writer_of",
]
