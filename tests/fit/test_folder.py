"""The run folder: numbers, ownership, and messages where it cannot be written."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kw_lightning.errors import RunError
from kw_lightning.fit.folder import (
    RunFolder,
    checkpoint_of,
    folder_of,
    new_folder,
    newest_folder,
    readable_errors,
    versions,
)
from kw_lightning.nn.engine.native import available, library


def test_folders_are_numbered(tmp_path: Path) -> None:
    paths = [new_folder("net", tmp_path).path.name for _ in range(3)]
    assert paths == ["net-1", "net-2", "net-3"]
    (tmp_path / "net-17").mkdir()
    (tmp_path / "network-90").mkdir()
    assert new_folder("net", tmp_path).path.name == "net-18"


def test_runs_that_are_a_link_to_nowhere_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=f"{tmp_path}/runs: File exists"):
        new_folder("net", tmp_path / "runs")
    assert new_folder("net", tmp_path / "new" / "runs").path == tmp_path / "new" / "runs" / "net-1"


def test_newest_is_by_number_and_has_a_checkpoint(tmp_path: Path) -> None:
    assert newest_folder("net", tmp_path / "nothing") is None
    for number in (2, 10, 11):
        (tmp_path / f"net-{number}" / "checkpoints").mkdir(parents=True)
    for number in (2, 10):
        (tmp_path / f"net-{number}" / "checkpoints" / "last.ckpt").touch()
    newest = newest_folder("net", tmp_path)
    assert newest is not None
    assert newest.path.name == "net-10"


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.claim(resume=False)
    with pytest.raises(RunError, match="another process is training in this folder"):
        RunFolder(tmp_path / "run").claim(resume=True)
    first.release()
    RunFolder(tmp_path / "run").claim(resume=True)


def test_the_lock_of_a_killed_process_is_free_although_its_forked_workers_live(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from kw_lightning.fit.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "folder.claim(resume=True)\n"
        "child = os.fork()\n"
        "print(child, flush=True) if child else None\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(RunError, match="another process is training in this folder"):
            RunFolder(tmp_path).claim(resume=True)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives
        RunFolder(tmp_path).claim(resume=True)
    finally:
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGKILL)


def test_a_folder_with_files_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match=f"{tmp_path} is not empty.*output=.*resume="):
        RunFolder(tmp_path).claim(resume=False)
    RunFolder(tmp_path).claim(resume=True)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match="is a file; a run needs a folder"):
        RunFolder(tmp_path / "run").claim(resume=False)


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"l\xe4ufe")
    with pytest.raises(RunError, match=r"l\\udce4ufe: found a folder's name that is no text in UTF-8"):
        RunFolder(path).claim(resume=False)
    assert not path.exists()


def test_checkpoint_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match=r"no checkpoints/last\.ckpt in this folder"):
        checkpoint_of(tmp_path)
    with pytest.raises(RunError, match="no such file or folder"):
        checkpoint_of(tmp_path / "x")
    folder.checkpoints.mkdir()
    folder.last.touch()
    folder.best.touch()
    assert checkpoint_of(tmp_path) == folder.last
    assert checkpoint_of(folder.best) == folder.best
    exported = tmp_path / "digits.ONNX"
    exported.touch()
    with pytest.raises(RunError, match=r"digits\.ONNX: an exported network, .*; a run folder or a checkpoint file is"):
        checkpoint_of(exported)
    assert folder_of(folder.best).path == tmp_path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "here: the disk is full, or a quota is reached"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), "there: Permission denied"),
        (OSError("cannot identify image file 'x.jpg'"), r"cannot identify image file 'x\.jpg'"),
    ],
)
def test_errors_of_the_system_become_messages(error: OSError, message: str) -> None:
    with pytest.raises(RunError, match=f"^{message}$"), readable_errors(Path("here")):
        raise error
    wrapped = RuntimeError("what torch.save makes of it")
    wrapped.__context__ = error
    with pytest.raises(RunError, match=f"^{message}$"), readable_errors(Path("here")):
        raise wrapped


def test_errors_of_the_program_stay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), readable_errors(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_text_is_written_whole(tmp_path: Path) -> None:
    RunFolder(tmp_path).write("a.txt", "β")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "β"


def test_versions_say_whether_the_compiled_passes_are_in_use_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(versions())["compiled_passes"].startswith("in use" if available() else "not in use")
    library.find.cache_clear()
    monkeypatch.setenv("KW_NATIVE", "0")
    assert json.loads(versions())["compiled_passes"] == "not in use: KW_NATIVE=0 is set"
    library.find.cache_clear()


def test_a_folder_that_is_refused_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(RunError, match="is not empty"):
        RunFolder(tmp_path).claim(resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]
