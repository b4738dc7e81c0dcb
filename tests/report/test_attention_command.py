"""`kw attention`: its numbers against plain ones, and files that a paper can use."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from kw_lightning.cli import application
from kw_lightning.fit import Result as Run
from kw_lightning.fit.evaluation import open_checkpoint
from kw_lightning.report.attention import EDGES, DetailedMetric


def attention(*arguments: object) -> Result:
    return CliRunner().invoke(application(), ["attention", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(hostile: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    done = attention(hostile.folder, "--split", "val", "--checkpoint", "last", "--output", folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"9 val images, last.ckpt -> {folder}\n")
    assert "difference between samples" in done.stdout
    return folder


def test_arrays_are_the_plain_means(written: Path, hostile: Run) -> None:
    opened = open_checkpoint(hostile.folder / "checkpoints/last.ckpt")
    images, targets = next(iter(opened.data.evaluation_loader("val")))
    rest = list(opened.data.evaluation_loader("val"))[1:]
    images = torch.cat([images, *(batch[0] for batch in rest)])
    targets = torch.cat([targets, *(batch[1] for batch in rest)])
    heard: list[Tensor] = []
    network = opened.module.network.eval()
    for name in ("first", "second"):
        layer = network.get_submodule(name)
        layer.attention.register_forward_hook(lambda module, args, alpha: heard.append(alpha))
    with torch.no_grad():
        network(images)
    alpha = torch.cat(heard, dim=1)  # [9, m_t, n]
    arrays = np.load(written / "attention.npz")
    np.testing.assert_allclose(arrays["shelf/mean"], alpha.mean(dim=0), atol=1e-6)
    assert arrays["shelf/layers"].tolist() == ["first", "second"]
    assert arrays["shelf/mixtures"].tolist() == [part.shape[1] for part in heard]
    assert arrays["shelf/negative_share"] == pytest.approx(float((alpha < 0).float().mean()))
    for index, part in enumerate(heard):
        assert arrays["shelf/layer_negative_share"][index] == pytest.approx(float((part < 0).float().mean()))
    for number in range(3):
        use = alpha[targets == number].abs().mean(dim=0).sum(dim=0)
        np.testing.assert_allclose(arrays["shelf/class_use"][number], use, rtol=1e-4)
    counts, _ = np.histogram(alpha.clamp(-1, 1).numpy(), EDGES)
    assert np.abs(arrays["shelf/histogram"] - counts).sum() <= 4  # those on an edge
    assert arrays["shelf/histogram"].sum() == alpha.numel()
    assert sorted(arrays["classes"].tolist())[0] == "$x^2 & _{"


def test_figures_are_vectors_with_drawn_type_and_pixels_enough(written: Path) -> None:
    for name in ("shelf", "shelf-classes"):
        drawing = ElementTree.parse(written / f"{name}.svg").getroot()
        tags = {element.tag.rpartition("}")[2] for element in drawing.iter()}
        assert not tags & {"text", "image"}  # the same type on every machine, and no pixels
        assert (written / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert Image.open(written / f"{name}.png").width >= 1200
    assert not list(written.glob("*.partial"))


def test_classes_that_come_late_and_several_labels_are_counted() -> None:
    alpha = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    metric = DetailedMetric([2], 3)
    metric.update(0, alpha[:2], torch.tensor([0, 0]))
    metric.update(0, alpha[2:], torch.tensor([3, 1, 3]))
    assert metric.class_use is not None
    assert metric.class_samples is not None
    assert metric.class_samples.tolist() == [2, 1, 0, 2]
    torch.testing.assert_close(metric.class_use[3], alpha[[2, 4]].sum(dim=(0, 1)))
    several = DetailedMetric([2], 3)
    several.update(0, alpha, torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1], [1, 1]]))
    assert several.class_use is not None
    torch.testing.assert_close(several.class_use[1], alpha[[1, 3, 4]].sum(dim=(0, 1)))


def test_mistakes_are_one_line(hostile: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, told in (
        ((hostile.folder, "--checkpoint", "lst"), 'found the unknown checkpoint "lst", allowed: best, last; did you'),
        ((hostile.folder / "checkpoints/best.ckpt", "--checkpoint", "last"), "is no folder"),
        ((tmp_path,), "no checkpoints/last.ckpt in this folder"),
        ((hostile.folder, "--split", "all"), 'found the unknown split "all"'),
        ((hostile.folder, "--output", tmp_path / "file"), "File exists"),
    ):
        failed = attention(*arguments)
        assert failed.exit_code == 1
        assert told in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
