"""The authors' own files: their checkpoints in and out, their configurations as recipes."""

from kw_lightning.published.checkpoint import (
    backbone_tensors,
    load_published,
    misfit,
    read_published,
    to_published,
    write_published,
)
from kw_lightning.published.fitting import PUBLISHED, fitting_recipe
from kw_lightning.published.keys import published_entries

__all__ = [
    "PUBLISHED",
    "backbone_tensors",
    "fitting_recipe",
    "load_published",
    "misfit",
    "published_entries",
    "read_published",
    "to_published",
    "write_published",
]
