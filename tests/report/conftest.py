"""A run of coloured pictures whose classes and description try to be markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_run import RECIPE, write_pictures

from kw_lightning.fit import Result, fit


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return a run with report, two epochs of 24 pictures."""
    folder = tmp_path_factory.mktemp("hostile")
    return fit(RECIPE, [f"data.root={write_pictures(folder)}"], output=folder / "run")


@pytest.fixture(scope="session")
def page(hostile: Result) -> Path:
    """Return the page of the run."""
    assert hostile.report is not None
    return hostile.report
