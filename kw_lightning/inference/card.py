"""The card of a saved network: a README with the metadata block that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kw_lightning.errors import mistake, times
from kw_lightning.planning import plan
from kw_lightning.planning.types import Plan, budget_text
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.writing import to_yaml
from kw_lightning.versions import package_versions

if TYPE_CHECKING:
    from kw_lightning.inference.saving import SavedNetwork

_CARD = """\
---
{header}---

# {name}

{description}

{size}

```python
import kw_lightning

model = kw_lightning.load("PATH_OR_hf://ORGANISATION/NAME")
model.predict("image.jpg", top=3)
```

## Network

{warehouses}

## Measured

{metrics}

## Classes

{classes}

## Made with

{versions}

Recipe `recipe.lock.yaml`, content hash `{hash}`. The licence of the weights is for their owner to state, in the first
lines of this file.
"""

SEVERAL = "\n\nAn image may be of several of them at once, or of none; each has a score of its own from 0 to 1."


def model_card(saved: SavedNetwork, metrics: Mapping[str, Any]) -> str:
    """Return the card of a saved network.

    Args:
        saved: the network and what belongs to it.
        metrics: by part of the data, as `{"test": {"accuracy": 0.97}}`.

    Raises:
        TypeError: metrics of no part.
    """
    wrong = next((part for part, values in metrics.items() if not isinstance(values, Mapping)), None)
    if wrong is not None:
        allowed = 'the metrics of a part of the data, as {"test": {"accuracy": 0.97}}'
        raise TypeError(mistake(metrics[wrong], allowed, what=f'"{wrong}" of'))
    recipe = saved.recipe
    planned = saved.plan or plan(recipe)
    ratio = f"{planned.parameters.ratio:.2f} times the static network's {planned.parameters.static:,}"
    return _CARD.format(
        header=to_yaml(
            {
                "library_name": "kw_lightning",
                "pipeline_tag": "image-classification",
                "license": "unknown",
                "tags": ["image-classification", "pytorch", "lightning", "dynamic-convolution", "KernelWarehouse"],
            }
        ),
        name=recipe.name,
        description=recipe.description or "A KernelWarehouse network (ICML 2024, arXiv:2406.07879).",
        size=f"{planned.parameters.kw:,} parameters, {ratio}.",
        warehouses=_warehouses(planned),
        metrics=_metrics(metrics, recipe.data.name if recipe.data else "unknown data"),
        classes=_classes(saved.classes) + (SEVERAL if saved.several else ""),
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
        hash=content_hash(dict(recipe.document.data)),
    )


def _warehouses(planned: Plan) -> str:
    if not planned.warehouses:
        return "A static network."
    lines = ["| warehouse | layers | cell | mixtures | cells | budget |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    for warehouse in planned.warehouses:
        partition = warehouse.partition
        lines.append(
            f"| {warehouse.name} | {len(warehouse.layers)} | {times(partition.cell_shape)} "
            f"| {partition.mixtures} | {partition.cells} | {budget_text(warehouse.asked)} |"
        )
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, Any], data: str) -> str:
    if not metrics:
        return "Nothing was measured."
    lines = [f"On `{data}`:", "", "| part | metric | value |", "| --- | --- | ---: |"]
    for part, values in metrics.items():
        lines += [f"| {part} | {name} | {value:.4f} |" for name, value in values.items() if isinstance(value, float)]
    return "\n".join(lines)


def _classes(classes: tuple[str, ...], most: int = 100) -> str:
    more = f" and {len(classes) - most} more, see `classes.json`" if len(classes) > most else ""
    return f"{len(classes)}: " + ", ".join(f"`{name}`" for name in classes[:most]) + more
