"""How the dynamic layers of a plan are computed, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kw_lightning.errors import times
from kw_lightning.nn.engine.planner import Choice
from kw_lightning.planning.engine import EnginePlan, LayerPaths

NAMES_SHOWN = 6


def engine_lines(plan: EnginePlan) -> Iterator[str]:
    """Yield the lines: for every layer the path that runs, the times of all that could, and why the others cannot."""
    samples = f"{plan.batch} sample{'s' if plan.batch > 1 else ''}"
    dtype = str(plan.dtype).removeprefix("torch.")
    yield f"engine: {plan.engine}; a batch of {samples}, {dtype} on {plan.device}"
    if plan.note is not None:
        yield plan.note
        return
    for layer in plan.layers:
        yield ""
        yield from _layer_lines(layer)
    yield ""
    yield _total(plan)
    yield "Seconds are estimates, by counted work; a * marks what runs, and - what has not been timed on such a layer."
    if plan.engine == "autotune":
        yield "engine: autotune takes them for the order in which it times the paths where they run."


def _layer_lines(layer: LayerPaths) -> Iterator[str]:
    problem = layer.problem
    shown = ", ".join(layer.names[:NAMES_SHOWN])
    more = f" and {len(layer.names) - NAMES_SHOWN} alike" if len(layer.names) > NAMES_SHOWN else ""
    groups = f" in {problem.convolution.groups} groups" if problem.convolution.groups > 1 else ""
    kernel = f"{times(problem.convolution.kernel_shape)}{groups} of {problem.cells} cells"
    yield f"{shown}{more}: {kernel}, input {problem.batch} × {times(problem.size)}"
    backward = {choice.path: choice for choice in layer.backward}
    rows = [
        (choice.path.name, _time(choice, layer.forward), _time(backward[choice.path], layer.backward))
        for choice in layer.forward
        if choice.refusal is None
    ]
    table = [("path", "forward", "backward"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for name, *cells in table:
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield f"  {name.ljust(widths[0])}  {right}".rstrip()
    reasons: dict[str, list[str]] = {}
    for choice in layer.forward:
        if choice.refusal is not None:
            reasons.setdefault(choice.refusal, []).append(choice.path.name)
    for reason, names in reasons.items():
        yield f"  not {', '.join(names)}: {reason}"


def _time(choice: Choice, choices: Sequence[Choice]) -> str:
    time = "-" if choice.seconds is None else _milliseconds(choice.seconds)
    return f"{time} {'*' if choice is choices[0] else ' '}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds > 0.1 else 1 if seconds > 0.01 else 2}f} ms"


def _total(plan: EnginePlan) -> str:
    parts = []
    for name in ("forward", "backward"):
        best = [(getattr(layer, name)[0].seconds, len(layer.names)) for layer in plan.layers]
        known = sum(seconds * count for seconds, count in best if seconds is not None)
        parts.append(f"{name} {_milliseconds(known)}")
    unknown = sum(len(layer.names) for layer in plan.layers if layer.forward[0].seconds is None)
    beside = f", {unknown} layers not timed" if unknown else ""
    return f"all dynamic layers without their attention: {', '.join(parts)}{beside}"
