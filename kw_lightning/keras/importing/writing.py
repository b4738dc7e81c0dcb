"""An imported recipe as a file that one reads and edits: a line for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from kw_lightning.recipe.writing import to_yaml

_HINT = """\
# Imported from Keras: the network with fresh start values. To make layers dynamic, write `warehouse: NAME` among their
# arguments and declare the warehouses:
#   warehouses:
#     NAME: {budget: 1}
"""


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return what `import_keras` gives as YAML."""
    head = {key: value for key, value in recipe.items() if key != "model"}
    lines = [
        f"    - {kind}: {_flow(arguments)}" for layer in recipe["model"]["layers"] for kind, arguments in layer.items()
    ]
    model = ["model:", f"  input: {_flow(recipe['model']['input'])}", "  layers:", *lines]
    return "\n".join([to_yaml(head).rstrip("\n"), "", _HINT.rstrip("\n"), *model]) + "\n"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()
