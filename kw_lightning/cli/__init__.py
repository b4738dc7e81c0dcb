"""The commands `kw` and `kw-fit`: one file a command, listed in `COMMANDS`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from kw_lightning.cli.output import error_console, forget_output, write_any_text
from kw_lightning.errors import KWError, RunError, in_options, printable
from kw_lightning.paths import FULL
from kw_lightning.versions import OWN, version_of

# Command → module with a function of the module's name. The modules import what is slow (torch) inside that
# function, so that `kw --help` and `kw check` start at once.
COMMANDS: dict[str, str] = {
    "list": "kw_lightning.cli.list",
    "show": "kw_lightning.cli.show",
    "check": "kw_lightning.cli.check",
    "plan": "kw_lightning.cli.plan",
    "diff": "kw_lightning.cli.diff",
    "new": "kw_lightning.cli.new",
    "lock": "kw_lightning.cli.lock",
    "import-keras": "kw_lightning.cli.import_keras",
    "schema": "kw_lightning.cli.schema",
    "fit": "kw_lightning.cli.fit",
    "sweep": "kw_lightning.cli.sweep",
    "evaluate": "kw_lightning.cli.evaluate",
    "report": "kw_lightning.cli.report",
    "attention": "kw_lightning.cli.attention",
    "predict": "kw_lightning.cli.predict",
    "import": "kw_lightning.cli.import_published",
    "export": "kw_lightning.cli.export",
    "bench": "kw_lightning.cli.bench",
    "doctor": "kw_lightning.cli.doctor",
}

INTERRUPTED = 130  # 128 + SIGINT, as shells count it
UNREAD = 141  # 128 + SIGPIPE: `kw list | head -1`


def command(name: str) -> Callable[..., Any]:
    """Return the function of a command; what it raises for the user becomes a message and an exit code."""
    module = import_module(COMMANDS[name])
    function: Callable[..., Any] = getattr(module, module.__name__.rpartition(".")[2])

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("allow_python") and "" not in sys.path:
            sys.path.append("")  # the user's package may lie in the folder where the command is run
        try:
            with in_options():
                return function(*args, **kwargs)
        except KWError as error:
            error_console().print(str(error), style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            forget_output()
            raise typer.Exit(UNREAD) from None
        except OSError as error:
            told = f"{error.filename}: {error.strerror}" if error.filename is not None else ""
            if error.errno in FULL:
                forget_output()
                told = "the output cannot be written: its disk is full, or a quota is reached"
            if not told:
                raise
            error_console().print(printable(told), style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(RunError.exit_code) from None
        except KeyboardInterrupt as interruption:
            said = str(interruption) or "Interrupted."
            error_console().print(said, style="yellow", highlight=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def show_version(wanted: bool) -> None:
    """Print the version and end, when `--version` is given."""
    if wanted:
        typer.echo(f"{OWN} {version_of(OWN)}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """KernelWarehouse for PyTorch Lightning: dynamic convolutions from a YAML recipe."""


def application() -> typer.Typer:
    """Return the command `kw` with all its subcommands."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.callback()(root)
    for name in COMMANDS:
        app.command(name)(command(name))
    return app


def main() -> None:
    """Run `kw`."""
    write_any_text()
    application()(prog_name="kw")


def fit_main() -> None:
    """Run `kw-fit`, the same as `kw fit`."""
    write_any_text()
    app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command("fit")(command("fit"))
    app(prog_name="kw-fit")
