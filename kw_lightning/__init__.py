"""KernelWarehouse (ICML 2024) for PyTorch Lightning.

The names below are loaded at their first use: reading and checking a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kw_lightning.builder import build, convert
    from kw_lightning.callbacks import KWCallback
    from kw_lightning.errors import KWError
    from kw_lightning.inference import load
    from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse
    from kw_lightning.planning.plan import plan
    from kw_lightning.recipe import load_recipe

__all__ = [
    "KWCallback",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWError",
    "KWLinear",
    "Warehouse",
    "build",
    "convert",
    "load",
    "load_recipe",
    "plan",
]

_MODULES = {
    "KWCallback": "callbacks",
    "KWError": "errors",
    "build": "builder",
    "convert": "builder",
    "load": "inference",
    "load_recipe": "recipe",
    "plan": "planning",
}

_OWN_IMPORTS = {"Any", "TYPE_CHECKING", "annotations", "import_module"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'nn')}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - _OWN_IMPORTS)
