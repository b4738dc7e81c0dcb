"""An imported recipe as a file that one reads and edits: a line for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from kw_lightning.recipe.writing import to_yaml

_HINT = """\
# Imported from Keras: the network {start}. To make layers dynamic, write `warehouse: NAME` among their
# arguments and declare the warehouses:
#   warehouses:
#     NAME: {{budget: 1}}
"""


def recipe_text(recipe: Mapping[str, Any], weights: str | None = None) -> str:
    """Return what `import_keras` gives as YAML.

    Args:
        weights: name of the file beside the recipe that the network starts from.
    """
    head = {key: value for key, value in recipe.items() if key != "model"}
    lines = [
        f"    - {kind}: {_flow(arguments)}" for layer in recipe["model"]["layers"] for kind, arguments in layer.items()
    ]
    start = [] if weights is None else [f"  {to_yaml({'pretrained': weights}).strip()}"]
    hint = _HINT.format(start="with fresh start values" if weights is None else "with its weights")
    model = ["model:", *start, f"  input: {_flow(recipe['model']['input'])}", "  layers:", *lines]
    return "\n".join([to_yaml(head).rstrip("\n"), "", hint.rstrip("\n"), *model]) + "\n"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()
