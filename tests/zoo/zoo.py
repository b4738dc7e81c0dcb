"""The sweep over other people's networks: what the package does with each, one row of a table a network.

Every builder of torchvision and one small network of each module of timm. `python tests/zoo/zoo.py` goes on where it
was stopped; `--again` measures all anew, and names on the command line measure these. The table is kept in
`tests/data/zoo.json`, and `tests/zoo/test_table.py` holds it to what is promised.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning import backbones
from kw_lightning.builder import apply_plan
from kw_lightning.errors import KWError, first_line
from kw_lightning.nn import set_temperature
from kw_lightning.planning import Plan, plan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

TABLE = Path(__file__).parents[1] / "data" / "zoo.json"
SECONDS = 240  # of one network
LARGEST = 40_000_000  # parameters of a network that is trained too; larger ones are planned on the meta device alone
SMALL = re.compile(r"atto|femto|pico|nano|tiny|small|mini|lite|xxs|_xs|_s\b|_b0|_050|_035|18|_10|_14")
CANDIDATES = 3


def torchvision_names() -> list[str]:
    """Return every builder of torchvision, as a recipe names it."""
    from torchvision.models import list_models

    return [f"torchvision/{name}" for name in list_models()]


def timm_modules() -> dict[str, list[str]]:
    """Return the networks of each of timm's modules, those with a name that promises a small one first."""
    import timm

    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        modules.setdefault(module, []).append(name)
    return {
        module: sorted(names, key=lambda name: (SMALL.search(name) is None, len(name), name))
        for module, names in sorted(modules.items())
    }


def timm_name(names: Sequence[str]) -> str:
    """Return the smallest of the first few networks of a module."""
    import timm

    sizes = {}
    for name in names[:CANDIDATES]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError):  # its constructor computes, which meta tensors cannot
            continue
    return f"timm/{min(sizes, key=lambda name: sizes[name]) if sizes else names[0]}"


def measure(name: str, module: str | None = None) -> dict[str, Any]:
    """Return one row of the table; what goes wrong is in it, and nothing is raised."""
    row: dict[str, Any] = {"name": name, **({"module": module} if module else {})}
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure(row, load_recipe({"kw": 1, "name": "zoo", "model": {"backbone": name}, "stages": "auto"}))
    except KWError as error:
        row["refused"] = first_line(error)
    except Exception as error:  # anything: that is what the sweep is for
        row["traceback"] = (
            f"{type(error).__name__}: {first_line(error)} at {traceback.extract_tb(error.__traceback__)[-1]}"
        )
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def _measure(row: dict[str, Any], recipe: Recipe) -> None:
    planned = plan(recipe)
    row |= {
        "static": planned.parameters.static,
        "kw": planned.parameters.kw,
        "ratio": round(planned.parameters.ratio, 4),
        "warehouses": len(planned.warehouses),
        "layers": sum(len(warehouse.layers) for warehouse in planned.warehouses),
        "worst": round(max(w.attention_parameters / w.cell_parameters for w in planned.warehouses), 3),
        "input": list(planned.input_shape or ()),
    }
    if planned.parameters.static > LARGEST:
        row["left_out"] = f"planned on the meta device alone: more than {LARGEST:,} parameters"
        return
    torch.manual_seed(0)
    static = backbones.create(recipe)
    conversion = apply_plan(planned, static, warm_start=True)
    row["warm_start_error"] = round(max(conversion.errors.values()), 8)
    reason = _train_a_step(conversion.model, planned)
    row["step"] = "ok" if reason is None else reason
    fresh = backbones.create(recipe)
    other = apply_plan(planned, fresh).model
    other.load_state_dict(conversion.model.state_dict())
    same = all(torch.equal(a, b) for a, b in zip(other.parameters(), conversion.model.parameters(), strict=True))
    row["reload"] = "ok" if same else "other parameters than were saved"


def _train_a_step(model: nn.Module, planned: Plan) -> str | None:
    """Train a step on the smallest input that the network takes; return why it could not, None when it did."""
    model.train()
    set_temperature(model, 0.5)
    failure = "no input was tried"
    for inputs in _inputs(planned):
        try:
            outputs = model(*inputs)
        except Exception as error:  # not what this network takes
            failure = first_line(error)
            continue
        loss = sum(tensor.float().square().mean() for tensor in _differentiable(outputs))
        if not isinstance(loss, Tensor):
            return "no output has a gradient"
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        loss.backward()
        optimizer.step()
        cells = [p for name, p in model.named_parameters() if name.endswith(".cells")]
        missing = [p for p in cells if p.grad is None or not torch.isfinite(p.grad).all()]
        return f"{len(missing)} of {len(cells)} warehouses have no finite gradient" if missing else None
    return failure


def _inputs(planned: Plan) -> Iterator[tuple[Any, ...]]:
    """Yield batches of two, small ones first: as images, as a detector takes them, and as two images."""
    channels, *size = planned.input_shape or (3, 224, 224)
    for share in (4, 2, 1):
        frames, sides = size[:-2], [max(side // share, 32) // 32 * 32 if share > 1 else side for side in size[-2:]]
        x = torch.rand(2, channels, *frames, *sides)
        boxes = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
        targets = [
            boxes | {"masks": torch.ones(1, *sides[-2:], dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3)}
        ] * 2
        yield (x,)
        if share > 2:
            yield (list(x), targets)
            yield (
                x.repeat_interleave(4, -1).repeat_interleave(4, -2),
                x.repeat_interleave(4, -1).repeat_interleave(4, -2),
            )


def _differentiable(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _differentiable(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _differentiable(value)


def table() -> dict[str, dict[str, Any]]:
    """Return the table that is kept, by the networks' names."""
    return {row["name"]: row for row in json.loads(TABLE.read_text())["networks"]} if TABLE.exists() else {}


def write(rows: Mapping[str, dict[str, Any]]) -> None:
    """Write the table, one line a network, in the order of the names."""
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    lines = ",\n".join(json.dumps(rows[name]) for name in sorted(rows))
    text = f'{{"versions": {json.dumps(versions)},\n"networks": [\n{lines}\n]}}\n'
    partial = TABLE.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(TABLE)


def sweep(only: Sequence[str] = (), *, again: bool = False, modules: Mapping[str, str] | None = None) -> None:
    """Measure the networks that are not in the table yet, each in a process that is ended after `SECONDS`.

    Args:
        only: measure these, and these anew.
        again: measure all anew.
        modules: timm's modules and the network that stands for each; by default those of the table, then the smallest.
    """
    rows = {} if again else table()
    known = {row["module"]: name for name, row in table().items() if "module" in row}
    for name, module in _networks(known | dict(modules or {})):
        if name not in only if only else name in rows:
            continue
        rows[name] = _in_time(name, module)
        print(json.dumps(rows[name]), flush=True)
        write(rows)


def _networks(known: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield the networks of the sweep, and the timm module that each stands for."""
    yield from ((name, None) for name in torchvision_names())
    for module, names in timm_modules().items():
        yield known.get(module) or timm_name(names), module


def _in_time(name: str, module: str | None) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    process = context.Process(target=lambda: queue.put(measure(name, module)))
    process.start()
    try:
        row: dict[str, Any] = queue.get(timeout=SECONDS)
    except Exception:  # queue.Empty: the time is over, or the process died of its memory
        row = {"name": name, **({"module": module} if module else {}), "refused": f"not done in {SECONDS} seconds"}
    process.kill()
    process.join()
    return row


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*", help="measure these anew, as torchvision/resnet18")
    arguments.add_argument("--again", action="store_true", help="measure all anew")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    sweep(chosen.names, again=chosen.again)
