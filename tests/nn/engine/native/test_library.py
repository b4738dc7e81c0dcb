"""Compiling the engine: kept, shared by processes, safe from damage and strangers, done without where it cannot be."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kw_lightning.nn.engine import Convolution, dynamic_convolution, native, planner, reference
from kw_lightning.nn.engine.native import library

sys.path.append(str(Path(__file__).parent))

from native_process import (
    COMPILER,
    Asked,
    ask,
    ask_in_threads,
    compilations,
    fill_disk,
    hostile_library,
    lose_name,
    program,
)

STRANGER = 54_321  # a user that is not here

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.find.cache_clear()
    planner.rank.cache_clear()
    yield
    library.find.cache_clear()
    planner.rank.cache_clear()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the files that `COMPILER` has compiled."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def home(tmp_path: Path, objects: Path) -> Path:
    """Return a home folder, beside a folder `bin` with a compiler that notes its calls."""
    text = COMPILER.format(calls=tmp_path / "calls", compiler=shutil.which("cc"), kept=objects)
    program(tmp_path / "bin" / "cc", text)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def ask_at(
    home: Path, before: Callable[[], None] | None = None, *, place: Path | None = None, **environment: str | None
) -> Asked:
    path = f"{home.parent / 'bin'}:{os.environ['PATH']}"
    environment = {"XDG_CACHE_HOME": None, "HOME": str(home), "PATH": path, "CC": None} | environment
    return ask(environment, place or home.parent, before)


def kept(home: Path) -> Path:
    (file,) = (home / ".cache" / "kw_lightning").glob("*.so")
    return file


def assert_in_use(asked: Asked, *lines: str) -> None:
    """Assert that the passes are in use, and that each of `lines` is a part of one line of those written."""
    assert asked.code == 0
    assert asked.answer.startswith("True in use, compiled by")
    assert len(asked.lines) == len(lines), asked.lines
    assert all(part in line for part, line in zip(lines, asked.lines, strict=True)), asked.lines


def test_where_there_is_a_compiler_the_passes_are_in_use() -> None:
    """Else a mistake in C would pass: what tests the passes is skipped without them."""
    if os.environ.get(library.SWITCH) == "0":
        pytest.skip("turned off")
    try:
        library.find_compiler()
    except library.LibraryError as error:
        pytest.skip(str(error))
    assert library.status().reason == ""


@needs_compiler
def test_two_processes_compile_at_once_and_a_third_finds_it(home: Path) -> None:
    places = [home.parent / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    with ThreadPoolExecutor() as pool:
        for asked in pool.map(lambda place: ask_at(home, place=place), places):
            assert_in_use(asked)
    count = compilations(home.parent)
    checksum = kept(home).with_name(f"{kept(home).name}.sha256")
    assert checksum.read_text() == f"{hashlib.sha256(kept(home).read_bytes()).hexdigest()}  {kept(home).name}\n"
    assert sorted(kept(home).parent.iterdir()) == [kept(home), checksum]
    for path in (kept(home).parent, kept(home), checksum):
        assert path.stat().st_mode & 0o077 == 0
    assert_in_use(ask_at(home))
    assert compilations(home.parent) == count


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),  # of a disk that was full: SIGBUS
        lambda file: file.write_bytes(bytes(file.stat().st_size)),  # after a loss of power
        lambda file: file.write_bytes(b"half"),
        flip,  # SIGSEGV, or wrong numbers
        lambda file: file.with_name(f"{file.name}.sha256").unlink(),
    ],
    ids=["half", "zeros", "garbage", "bit", "checksum"],
)
def test_a_damaged_library_is_compiled_anew_once(damage: Callable[[Path], None], home: Path) -> None:
    assert_in_use(ask_at(home))
    damage(kept(home))
    assert_in_use(ask_at(home), f"{kept(home)} is damaged")
    assert compilations(home.parent) == 2
    assert_in_use(ask_at(home))
    assert compilations(home.parent) == 2


def plant(home: Path) -> Path:
    """Put another library in the place of the kept one, its checksum beside it; return what it writes when loaded."""
    mark = home / "mark"
    content = hostile_library(home, mark)
    kept(home).write_bytes(content)
    ctypes.CDLL(str(kept(home)))
    mark.unlink()  # so the code of a stranger would run
    checksum = kept(home).with_name(f"{kept(home).name}.sha256")
    checksum.write_text(f"{hashlib.sha256(content).hexdigest()}  {kept(home).name}\n")
    return mark


def link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


@needs_compiler
@pytest.mark.parametrize(
    "expose",
    [
        lambda file: file.chmod(0o666),
        link,
        pytest.param(lambda file: os.chown(file, STRANGER, -1), marks=needs_root),
    ],
    ids=["writable by all", "link", "of another"],
)
def test_a_file_that_others_can_have_written_is_not_loaded(expose: Callable[[Path], None], home: Path) -> None:
    assert_in_use(ask_at(home))
    mark = plant(home)
    expose(kept(home))
    assert_in_use(ask_at(home), "compiled anew")
    assert_in_use(ask_at(home))
    assert compilations(home.parent) == 2
    assert not mark.exists()


@needs_compiler
@pytest.mark.parametrize(
    ("expose", "line"),
    [
        (lambda folder: folder.chmod(0o777), "kw_lightning can be written by others"),
        (lambda folder: folder.parent.chmod(0o777), ".cache can be written by others"),
        pytest.param(lambda folder: os.chown(folder, STRANGER, -1), "belongs to another user", marks=needs_root),
        pytest.param(lambda folder: os.chown(folder.parent, STRANGER, -1), "belongs to another user", marks=needs_root),
    ],
    ids=["writable by all", "parent writable by all", "of another", "parent of another"],
)
def test_a_folder_that_others_can_write_is_not_used(expose: Callable[[Path], None], line: str, home: Path) -> None:
    assert_in_use(ask_at(home))
    mark = plant(home)
    before = sorted((home / ".cache").rglob("*"))
    expose(kept(home).parent)
    assert_in_use(ask_at(home), line)
    assert compilations(home.parent) == 2  # once in each process
    assert not mark.exists()
    assert sorted((home / ".cache").rglob("*")) == before


@needs_root
@needs_compiler
def test_nothing_is_made_in_the_home_of_another(home: Path) -> None:
    os.chown(home, STRANGER, -1)
    assert_in_use(ask_at(home), "belongs to another user")
    assert list(home.iterdir()) == []


@needs_compiler
@pytest.mark.parametrize(
    ("environment", "before", "line"),
    [
        ({}, fill_disk, "No space left on device: the compiled passes are not kept"),
        ({"HOME": None}, lose_name, "there is no home folder"),
        ({"HOME": "/dev/null"}, None, "Not a directory"),
        ({"CC": 'gcc "'}, None, 'CC=gcc " is no command (No closing quotation)'),
    ],
    ids=["full disk", "no home", "a file", "quote"],
)
def test_it_is_compiled_once_in_a_process_that_cannot_keep_it(
    environment: dict[str, str | None], before: Callable[[], None] | None, line: str, home: Path
) -> None:
    assert_in_use(ask_at(home, before, **environment), line)
    assert compilations(home.parent) == 1
    assert not list(home.rglob(".engine*"))


@needs_compiler
def test_threads_that_ask_at_once_compile_once(home: Path) -> None:
    assert_in_use(ask_at(home, ask_in_threads))
    assert compilations(home.parent) == 1


@needs_compiler
def test_a_compiler_whose_library_is_empty_is_done_without(home: Path) -> None:
    text = """#!/bin/sh
for last; do :; done
case "$*" in *-shared*) set -- -shared -x c /dev/null -o "$last" ;; esac
exec cc "$@" -O0
"""
    asked = ask_at(home, CC=str(program(home / "mine", text)))
    assert asked.code == 0
    assert asked.answer.startswith("False not in use: the library cannot be opened")
    (line,) = asked.lines
    assert "kw_lanes" in line
    assert list((home / ".cache" / "kw_lightning").iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("refused", ["-march", "-m"])
def test_a_compiler_that_does_not_know_this_processor_compiles_for_all_of_its_kind(refused: str, home: Path) -> None:
    text = f"""#!/bin/sh
case "$*" in *{refused}*=native*) echo "error: unknown value native" >&2; exit 1 ;; esac
exec cc "$@"
"""
    assert_in_use(ask_at(home, CC=str(program(home / "mine", text))))
    assert compilations(home.parent) == 1
    assert ("-mcpu=native" in (home.parent / "calls").read_text()) == (refused == "-march")


@needs_compiler
def test_a_library_with_another_structure_than_pythons_is_done_without_and_told_once(home: Path) -> None:
    text = """#!/bin/sh
# Compiles the sources with one field more in the middle of `Pass`.
for last; do
    case "$last" in *.c) source=$last ;; esac
done
if [ -n "$source" ]; then
    mkdir {folder}/$$ && cd {folder}/$$
    cp "$(dirname "$source")"/*.h "$(dirname "$source")"/*.c .
    sed -i 's/index_t tiles; /index_t added, tiles; /' pass.h
    exec cc -O0 -march=native -fPIC -fopenmp -c "$(basename "$source")" -o "$last"
fi
exec cc "$@"
"""
    (home.parent / "changed").mkdir()
    asked = ask_at(home, CC=str(program(home / "mine", text.format(folder=home.parent / "changed"))))
    assert asked.code == 0
    reason = "the library takes its arguments otherwise: Pass.tiles is 8 bytes at "
    assert asked.answer.startswith(f"False not in use: {reason}")
    (line,) = asked.lines
    assert reason in line
    assert list((home / ".cache" / "kw_lightning").iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KW_NATIVE": "0"}, "KW_NATIVE=0 is set"),
        ({"PATH": "/nowhere", "CC": ""}, "no C compiler found"),
        ({"CC": "false"}, "false failed: exit code 1"),
        ({"CC": f"{sys.executable} -c pass"}, "made no library"),
    ],
)
def test_without_it_other_paths_give_the_same_and_the_reason_is_told_once(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.manual_seed(0)
    geometry = Convolution((16, 16, 3, 3), (16, 16, 1, 1), (1, 1), (1, 1), (1, 1))
    for side in (6, 7):
        x, attention, cells = torch.randn(3, 16, side, side), torch.randn(3, 9, 5), torch.randn(5, 16, 16, 1, 1)
        y = dynamic_convolution(x, attention, cells, geometry)
        torch.testing.assert_close(y, reference.convolve(x, attention, cells, geometry), rtol=1e-4, atol=1e-4)
    assert not native.available()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert message in record.getMessage()
    assert message in str(native.status())
