"""What a forward pass shows against the layers that a recipe chooses: weights that are read, and where the batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from kw_lightning.errors import Problem
from kw_lightning.planning.network import Layer, reading
from kw_lightning.planning.selection import Choice
from kw_lightning.planning.tracing import Call, Shape, Trace, trace
from kw_lightning.recipe.types import Document, Warehouse

Chosen = Mapping[str, Sequence[Choice]]


def read_in_training(
    model: nn.Module,
    shape: Shape | None,
    forward: Trace,
    warehouses: Sequence[Warehouse],
    chosen: Chosen,
    document: Document,
) -> list[Problem]:
    """Return a problem for every chosen layer whose weight the network reads in training, where evaluation lets it be.

    A layer that is neither called nor read is no problem: discriminators, momentum encoders and auxiliary heads are
    called by others, or in training only.
    """
    if shape is None or forward.failure is not None:
        return []
    pairs = [(warehouse, choice.layer) for warehouse in warehouses for choice in chosen[warehouse.name]]
    silent = [(warehouse, layer) for warehouse, layer in pairs if not forward.calls_of(layer.names)]
    if not silent:
        return []
    training = trace(model, shape, batch=2, training=True)
    reads = [(warehouse, layer, reading(layer.names, training)) for warehouse, layer in silent]
    return [
        document.problem(warehouse.path, f'"{layer.name}" cannot be made dynamic: {refusal}')
        for warehouse, layer, refusal in reads
        if refusal is not None
    ]


def place_batches(
    model: nn.Module,
    shape: Shape | None,
    forward: Trace,
    warehouses: Sequence[Warehouse],
    chosen: Mapping[str, tuple[Choice, ...]],
    document: Document,
) -> tuple[dict[str, tuple[Choice, ...]], list[Problem]]:
    """Find out which dimension of every chosen linear layer's input is the batch: with a wrong one samples would mix.

    The network is run with one sample and with two on the meta device. The dimension of a layer's input that grows is
    the batch, or the batch folded with something else. Where the network itself takes [sequence, batch, channels], the
    two samples are two steps of a sequence instead; a module with `batch_first=False` beside a layer hints at that, and
    then nothing is known.

    Returns:
        The layers, without `Layer.beside` where the batch is known, and a problem for every warehouse that says another
        dimension than was found.
    """
    problems = [
        document.problem(
            f"{warehouse.path}.batch_dim",
            f'batch_dim is for linear layers: "{choice.name}" is a {choice.layer.type}, whose batch is dimension 0',
        )
        for warehouse in warehouses
        if warehouse.batch_dim
        for choice in chosen[warehouse.name][:1]
        if choice.layer.type != "Linear"
    ]
    if problems or shape is None or not any(len(inputs) > 2 for inputs in _linear_inputs(forward, chosen)):
        return dict(chosen), problems
    two = trace(model, shape, batch=2)
    settled = dict(chosen)
    for warehouse in warehouses:
        choices = chosen[warehouse.name]
        known = [choice for choice in choices if _is_known(choice.layer, forward, two)]
        settled[warehouse.name] = tuple(_without_doubt(choice) if choice in known else choice for choice in choices)
        misplaced = [found for choice in known for found in _misplaced(choice, warehouse, forward, two)]
        if misplaced:
            more = f" (and {len(misplaced) - 1} other layers of the warehouse)" if len(misplaced) > 1 else ""
            problems.append(document.problem(warehouse.path, misplaced[0] + more))
    return settled, problems


def _is_known(layer: Layer, one: Trace, two: Trace) -> bool:
    if layer.beside is None:
        return True
    pairs = zip(one.calls_of([layer.beside]), two.calls_of([layer.beside]), strict=False)
    return any(1 in _grown(before, after) for before, after in pairs)


def _without_doubt(choice: Choice) -> Choice:
    return replace(choice, layer=replace(choice.layer, beside=None))


def _grown(before: Call, after: Call) -> list[int]:
    """Return the dimensions of an input that are larger for two samples than for one."""
    if len(before.inputs) != len(after.inputs):
        return []
    return [d for d, (one, two) in enumerate(zip(before.inputs, after.inputs, strict=True)) if one != two]


def _linear_inputs(forward: Trace, chosen: Chosen) -> Iterator[Shape]:
    for choices in chosen.values():
        for choice in choices:
            if choice.layer.type == "Linear":
                yield from (call.inputs for call in forward.calls_of(choice.layer.names))


def _misplaced(choice: Choice, warehouse: Warehouse, one: Trace, two: Trace) -> Iterator[str]:
    said = warehouse.batch_dim or 0
    names = choice.layer.names
    for before, after in zip(one.calls_of(names), two.calls_of(names), strict=False):
        grown = _grown(before, after) if choice.layer.type == "Linear" and len(before.inputs) > 2 else []
        if grown and said not in grown:
            cure = f"say batch_dim: {grown[0]} in the warehouse" if grown[0] else "leave batch_dim out of the warehouse"
            yield (
                f'samples would mix in "{choice.name}": it gets {list(before.inputs)} for one sample and '
                f"{list(after.inputs)} for two, so its batch is dimension {grown[0]}, not {said}; {cure}"
            )
            return


__all__ = ["place_batches", "read_in_training"]
