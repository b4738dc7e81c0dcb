"""Data by name: the registry of data sets, what happens to their images, and the data module that feeds them."""

from kw_lightning.fit.data.module import ImageData, data_module
from kw_lightning.fit.data.sets import DATA_SETS, Source

__all__ = ["DATA_SETS", "ImageData", "Source", "data_module"]
