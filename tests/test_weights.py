"""Files of weights that other programs have written."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kw_lightning.errors import RunError
from kw_lightning.weights import read_weights

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.arange(2.0)}
ARGUMENTS = argparse.Namespace(lr=0.1, workers=4)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in WEIGHTS.items()}


FILES: dict[str, Mapping[str, Any]] = {
    "a network's own": WEIGHTS,
    "of torchvision's trainings": {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 9, "args": ARGUMENTS},
    "of timm's trainings": {"epoch": 9, "arch": "resnet18", "state_dict": WEIGHTS, "args": ARGUMENTS, "metric": 0.5},
    "with an average beside": {"state_dict": WEIGHTS, "state_dict_ema": prefixed("ema.")},
    "of DDP": {"state_dict": prefixed("module.")},
    "of a compiled network in DDP": prefixed("module._orig_mod."),
    "of a LightningModule with a compiled network": {"state_dict": prefixed("model._orig_mod."), "epoch": 9},
    "within each other": {"model": {"state_dict": WEIGHTS}},
    "under a name of one's own": {"net": WEIGHTS, "acc": 0.5},
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_weights_come_without_wrappers_and_prefixes(content: Mapping[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    found = read_weights(tmp_path / "weights.pth")
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


def test_prefixes_go_from_safetensors_too_but_not_what_the_network_is_called(tmp_path: Path) -> None:
    save_file(prefixed("module.model."), tmp_path / "weights.safetensors")
    assert list(read_weights(tmp_path / "weights.safetensors")) == sorted(WEIGHTS)
    known = nn.ModuleDict({"model": nn.ModuleDict({"fc": nn.Linear(3, 2)})}).state_dict()
    assert read_weights(tmp_path / "weights.safetensors", known=known.keys()).keys() == known.keys()


def circular() -> Any:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", r"not a checkpoint, or a damaged one: .*torch\.save\(network\.state_dict\(\), FILE\) writes one"),
        (nn.Linear(3, 2), "it holds other things than tensors, or is damaged; no code of a file is run; torch.save"),
        (
            {"one": WEIGHTS, "other": WEIGHTS},
            "found no state_dict of tensors neither by itself nor under state_dict, model",
        ),
        (circular(), "found no state_dict of tensors"),
        ([1, 2], "found no state_dict of tensors"),
    ],
)
def test_what_is_no_file_of_weights_is_one_message(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RunError, match=rf"^{path}: .*{message}"):
        read_weights(path)


def test_a_part_is_taken_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": prefixed("other."), "ema": {"state_dict": WEIGHTS}}, path)
    assert list(read_weights(path, part="ema")) == list(WEIGHTS)
    with pytest.raises(RunError, match="found no state_dict of tensors under average"):
        read_weights(path, part="average")
