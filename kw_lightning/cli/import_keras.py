"""`kw import-keras`: from a model of Keras to a recipe, and its weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_keras(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="What model.to_json() of Keras 3 wrote, or model.save() as .keras.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; without it the recipe is printed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The recipe's name; the model's unless given.")] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="A .weights.h5 file; a .keras file has its own.")
    ] = None,
) -> None:
    """Turn a Keras model into a recipe: a network to which warehouses are then added.

    Layers that a recipe does not have are listed, all at once. Weights are written beside the recipe, OUTPUT with the
    ending .safetensors, and the network starts from them; the JSON has none, and its network starts anew. Keras itself
    is not needed, h5py is for weights.
    """
    from kw_lightning.errors import RunError
    from kw_lightning.paths import user_path, writable

    source = user_path(model)
    if weights is None and source.suffix == ".keras" and output is not None:
        weights = source
    if weights is not None and output is None:
        raise RunError("weights are written beside the recipe: give --output FILE for it")
    target = None if output is None else user_path(output)
    beside = None if weights is None or target is None else target.with_suffix(".safetensors")
    for path in filter(None, (target, beside)):
        if path.exists():
            raise RunError(f"{path}: there is such a file already; it is left as it is")
    # slow to import: torch
    from safetensors.torch import save

    from kw_lightning.keras.importing import import_model, load_weights, model_json, open_weights, recipe_text

    imported = import_model(model_json(source), file=str(model), name=name)
    text = recipe_text(imported.recipe, None if beside is None else beside.name)
    if target is None:
        typer.echo(text, nl=False)
        return
    tensors = b""
    if weights is not None:
        with open_weights(user_path(weights)) as archive:
            tensors = save(load_weights(imported, archive), metadata={"format": "pt"})
    with writable(target) as partial:
        if beside is not None:
            partial.with_name(beside.name).write_bytes(tensors)
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {target}" + (f", and its weights {beside}" if beside else ""), err=True)
