"""Checkpoint files: whole or not at all, and damage is noticed."""

import os
import pickle
import random
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from kw_lightning.callbacks.checkpoint_io import AtomicCheckpointIO, read, verify
from kw_lightning.errors import RunError
from kw_lightning.paths import partial_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(5000.0), "names": ["a", "b"]}, path)
    return path


def test_a_flipped_bit_is_noticed_wherever_it_is(checkpoint: Path) -> None:
    good = checkpoint.read_bytes()
    expected = torch.load(checkpoint)
    dice = random.Random(0)
    messages = []
    for _ in range(400):
        damaged = bytearray(good)
        damaged[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            found = read(checkpoint)
        except RunError as error:
            messages.append(str(error))
        else:  # in the padding between the parts
            assert torch.equal(found["weights"], expected["weights"])
            assert found["names"] == expected["names"]
    assert len(messages) > 300
    assert all("not a checkpoint, or a damaged one" in message for message in messages)


def test_an_altered_pickle_with_a_right_checksum_is_one_message(checkpoint: Path) -> None:
    dice = random.Random(1)
    messages = []
    for _ in range(100):
        with zipfile.ZipFile(checkpoint) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in parts if name.endswith("data.pkl"))
        content = bytearray(parts[name])
        content[dice.randrange(len(content))] = dice.randrange(256)
        other = checkpoint.with_name("altered.ckpt")
        with zipfile.ZipFile(other, "w") as archive:
            for part, data in parts.items():
                archive.writestr(part, bytes(content) if part == name else data)
        verify(other)
        try:
            read(other)
        except RunError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith(f"{other}: not a checkpoint, or a damaged one (") for message in messages)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    torch.save({"x": Evil()}, tmp_path / "evil.ckpt", pickle_module=pickle)
    with pytest.raises(RunError, match="UnpicklingError"):
        read(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, nn.BatchNorm1d(2).state_dict(), [1], torch.zeros(3)])
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_program_is_one_message_where_a_run_is_to_go_on_from_it(
    tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    trainer = Trainer(
        plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1
    )
    with pytest.raises(RunError, match=r"other\.ckpt: not a checkpoint.*: found a .*, allowed: a map"):
        trainer.fit(BoringModel(), ckpt_path=tmp_path / "other.ckpt")


def test_what_fabric_and_torch_wrote_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    weights = nn.BatchNorm1d(2).state_dict()
    torch.save(weights, tmp_path / "weights.ckpt")
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.ckpt")
    assert list(found) == list(weights)
    assert "running_mode" not in found
    AtomicCheckpointIO().save_checkpoint(found, tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert (type(again), list(again), vars(again)) == (OrderedDict, list(weights), vars(weights))


def test_a_cut_file_is_one_message(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"last\.ckpt: not a checkpoint, or a damaged one \(BadZipFile\)"):
        AtomicCheckpointIO().load_checkpoint(checkpoint)


def test_what_a_kill_left_is_written_over(checkpoint: Path) -> None:
    partial_of(checkpoint).write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"step": 2}, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert read(checkpoint) == {"step": 2}


class EndsAChild:
    """As if a process that reads images ended while a checkpoint is written."""

    def __reduce__(self) -> tuple[type[OrderedDict[str, int]], tuple[()]]:
        os.kill(os.getpid(), signal.SIGCHLD)
        return OrderedDict, ()


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system has no such signal")
def test_a_child_that_ends_is_heard_of_when_the_file_is_whole(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    path = tmp_path / "last.ckpt"
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            AtomicCheckpointIO().save_checkpoint({"child": EndsAChild(), "weights": torch.arange(5000.0)}, path)
        assert signal.getsignal(signal.SIGCHLD) is fail
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert torch.equal(read(path)["weights"], torch.arange(5000.0))
    assert not partial_of(path).exists()
