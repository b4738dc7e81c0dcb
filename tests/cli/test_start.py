"""How soon the commands answer: a mistake in the recipe is told before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from kw_lightning.cli import application
try:
    application()(sys.argv[1:], prog_name="kw")
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "lightning" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nope"], 'found the unknown recipe "nope"'),
        (["fit", "digits-resnet", "train.epoch=1"], 'did you mean "epochs"?'),
        (["plan", "digits-resnet", "warehouses.stage2.budget=-1"], "found -1, allowed: "),
        (["bench", "nope"], 'found the unknown recipe "nope"'),
    ],
)
def test_a_mistake_in_the_recipe_is_told_without_torch(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert message in result.stderr
    assert result.stdout == "2 False False\n"


STOPPED_AT_AN_IMPORT = """
import builtins, os, signal, sys
from kw_lightning.__main__ import fit_main
before, module = builtins.__import__, sys.argv.pop(1)
def import_and_stop(name, *arguments, **options):
    if name == module:
        builtins.__import__ = before
        os.kill(os.getpid(), signal.SIGINT)
    return before(name, *arguments, **options)
builtins.__import__ = import_and_stop
fit_main()
"""


@pytest.mark.parametrize("module", ["typer", "jsonschema", "torch"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(module: str) -> None:
    command = [sys.executable, "-c", STOPPED_AT_AN_IMPORT, module, "digits-resnet", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")
