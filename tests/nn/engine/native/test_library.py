"""Compiling the engine: cached, shared by processes, and done without where it cannot be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kw_lightning.nn.engine import Convolution, dynamic_convolution, native, planner, reference
from kw_lightning.nn.engine.native import library

PROGRAM = "from kw_lightning.nn.engine.native import available; print(available())"

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    planner.rank.cache_clear()
    yield
    library.library.cache_clear()
    planner.rank.cache_clear()


@needs_compiler
def test_two_processes_compile_at_once_and_a_third_finds_it(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=200)[0].strip() for process in processes] == ["True", "True"]
    (built,) = (tmp_path / "kw_lightning").iterdir()
    before = built.stat().st_mtime_ns
    assert native.available()
    assert [built] == list((tmp_path / "kw_lightning").iterdir())
    assert built.stat().st_mtime_ns == before
    assert (tmp_path / "kw_lightning").stat().st_mode & 0o077 == 0


@needs_compiler
@pytest.mark.parametrize("broken", ["folder", "file"])
def test_a_cache_that_is_of_no_use_is_done_without(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "folder":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        (tmp_path / "file").write_text("")
    else:
        assert native.available()
        (built,) = (tmp_path / "kw_lightning").iterdir()
        built.unlink()  # the loaded one stays whole
        built.write_bytes(b"half")
        library.library.cache_clear()
    assert native.available()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KW_NATIVE": "0"}, ""),
        ({"PATH": "/nowhere", "CC": ""}, "no C compiler"),
        ({"CC": "false"}, "not used"),
        ({"CC": f"{sys.executable} -c pass"}, "not used"),
    ],
)
def test_without_it_other_paths_give_the_same(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.manual_seed(0)
    x, attention, cells = torch.randn(3, 16, 6, 6), torch.randn(3, 9, 5), torch.randn(5, 16, 16, 1, 1)
    geometry = Convolution((16, 16, 3, 3), (16, 16, 1, 1), (1, 1), (1, 1), (1, 1))
    with caplog.at_level(logging.INFO):
        y = dynamic_convolution(x, attention, cells, geometry)
    assert not native.available()
    assert message in caplog.text
    torch.testing.assert_close(y, reference.convolve(x, attention, cells, geometry), rtol=1e-4, atol=1e-4)
