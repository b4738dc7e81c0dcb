"""`kw bench`: how fast a recipe's network is, beside the static network and the published form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import JsonOption
from kw_lightning.cli.completion import complete_recipe


def bench(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]...",
            help="Recipe files, or names of shipped recipes. Default: resnet18-kw-1x.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 16,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the input; the network's usual.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16 (half: by autocast).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    engine: Annotated[str | None, typer.Option(help="The engine of every layer; default: the recipe's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU; default: torch's.")] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Channels last, of networks and input.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the networks, not the single layers.")] = False,
    compile_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="Of torch.compile: reduce-overhead for CUDA graphs.")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Measure every dynamic layer too.")] = True,
    reference: Annotated[bool, typer.Option(help="Measure the published form too: slow, and large.")] = True,
    exported: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="In place of recipes: ONNX and OpenVINO files of kw export, beside their network."
        ),
    ] = None,
    json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> None:
    """Measure networks with warehouses: time in training and inference, bytes kept, achieved GFLOP/s.

    With --exported: the time of inference of files in their runtimes, beside the static and the dynamic network.
    """
    if exported:
        _exported(exported, recipes, batch, size, repeats, threads, json=json, in_markdown=markdown)
        return
    from kw_lightning.recipe import load_recipe

    loaded = [load_recipe(source) for source in recipes or ["resnet18-kw-1x"]]
    # slow to import: torch
    from json import dumps

    import torch

    from kw_lightning.bench import Setting, describe_machine
    from kw_lightning.bench.run import parse_device, parse_dtype, parse_mode, prepare_bench, run_bench
    from kw_lightning.bench.table import LAYER_HEAD, NETWORK_HEAD, aligned, layer_rows, network_rows
    from kw_lightning.bench.table import markdown as markdown_table

    if threads is not None:
        torch.set_num_threads(threads)
    places = parse_dtype(dtype), parse_device(device)
    mode = parse_mode(compile_mode) if compile_mode else "default" if compiled else None
    setting = Setting((batch,), *places, repeats, channels_last, reference, mode)
    prepared = [prepare_bench(recipe, setting, size=size, engine=engine) for recipe in loaded]
    machine = describe_machine(setting.device, setting.dtype)
    reports = [run_bench(one, layers=layers) for one in prepared]
    if json:
        typer.echo(dumps({"machine": machine.to_dict(), "networks": [report.to_dict() for report in reports]}))
        return
    form = markdown_table if markdown else aligned
    typer.echo(f"{machine}\n")
    rows = [row for report in reports for row in network_rows(report.title, report.networks)]
    typer.echo(form(NETWORK_HEAD, rows))
    for report in reports:
        if report.layers:
            alone = ", not compiled" if mode else ""
            typer.echo(f"\n{report.title}, layers{alone}: forward and backward\n")
            typer.echo(form(LAYER_HEAD, layer_rows(report.layers)))


def _exported(
    files: list[Path],
    recipes: list[str] | None,
    batch: int,
    size: int | None,
    repeats: int,
    threads: int | None,
    *,
    json: bool,
    in_markdown: bool,
) -> None:
    from kw_lightning.errors import RunError, times

    if recipes:
        raise RunError("--exported takes the network from the file: give it, or recipes")
    # slow to import: torch
    from json import dumps

    import torch

    from kw_lightning.bench import describe_machine
    from kw_lightning.bench.exported import bench_exported
    from kw_lightning.bench.table import aligned, markdown, milliseconds

    if threads is not None:
        torch.set_num_threads(threads)
    shape, found = bench_exported(files, batch=batch, size=size, repeats=repeats)
    machine = describe_machine(torch.device("cpu"), torch.float32)
    if json:
        latencies = [latency.to_dict() for latency in found]
        typer.echo(dumps({"machine": machine.to_dict(), "input": list(shape), "exported": latencies}))
        return
    rows = [(latency.name, milliseconds(latency.seconds), f"{latency.ratio:.2f} ×") for latency in found]
    typer.echo(f"{machine}\n\ninference of {times(shape)}\n")
    typer.echo((markdown if in_markdown else aligned)(("runtime", "time", "to static"), rows))
