"""The authors' own files: their checkpoints in and out, their configurations as recipes."""

from kw_lightning.published.checkpoint import (
    backbone_tensors,
    load_published,
    misfit,
    read_published,
    to_published,
    write_published,
)
from kw_lightning.published.keys import published_entries
from kw_lightning.published.placed import WORD, load_placed, placed_folder

__all__ = [
    "WORD",
    "backbone_tensors",
    "load_placed",
    "load_published",
    "misfit",
    "placed_folder",
    "published_entries",
    "read_published",
    "to_published",
    "write_published",
]
