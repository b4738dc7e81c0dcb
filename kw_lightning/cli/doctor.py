"""`kw doctor`: whether this machine, or a run, is as it has to be."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from kw_lightning.cli.arguments import JsonOption, RunCodeOption

AMISS = 1
"""The exit code where something is not as it has to be."""


def doctor(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder; without one, this machine.")] = None,
    json: JsonOption = False,
    allow_python: RunCodeOption = None,
) -> None:
    """Look at this machine (versions, devices, compiler, compiled passes, cache folder), or at the files of a run.

    Of a run: hashes, shapes, finite numbers, and whether the temperature has reached its end. The exit code is 1 where
    something is amiss.
    """
    # slow to import: torch and lightning
    from rich.table import Table

    from kw_lightning.cli.output import console
    from kw_lightning.doctor import examine_machine, examine_run

    findings = examine_machine() if run is None else examine_run(run, allow_python=tuple(allow_python or ()))
    amiss = [finding for finding in findings if finding.amiss]
    if json:
        found = {one.subject: {"found": one.found, "amiss": one.amiss} for one in findings}
        typer.echo(dumps({"ok": not amiss, "findings": found}))
    else:
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            style = "red" if finding.amiss else ""
            table.add_row("amiss" if finding.amiss else "ok", finding.subject, finding.found, style=style)
        screen = console()
        screen.print(table, highlight=False)
        screen.print(f"{len(amiss)} of {len(findings)} amiss" if amiss else "nothing amiss", highlight=False)
    if amiss:
        raise typer.Exit(AMISS)
