"""AttentionStatistics: the metric against plain formulas, and what a Trainer logs and writes."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from callback_networks import Classifier, dynamic_net, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.fx import GraphModule

from kw_lightning.callbacks.attention import AttentionStatistics
from kw_lightning.callbacks.attention_metric import AttentionMetric
from kw_lightning.callbacks.figures import picture, publish
from kw_lightning.callbacks.heat_map import heat_map
from kw_lightning.nn import KWLayer, set_temperature
from kw_lightning.nn.partition import partition

SCALARS = {"negative_share", "entropy", "effective_cells", "dead_cells", "similarity"}


def attentions() -> list[Tensor]:
    """α of two layers [12 samples, 3 and 2 mixtures, 5 cells]; the last cell is all but unused."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 1e-4])
    return [torch.randn(12, m, 5, generator=generator) * scale + 0.3 * scale for m in (3, 2)]


def added(layers: list[Tensor], *, batches: int = 1) -> AttentionMetric:
    metric = AttentionMetric([alpha.shape[1] for alpha in layers], cells=5)
    for index, alpha in enumerate(layers):
        for batch in alpha.chunk(batches):
            metric.update(index, batch)
    return metric


def test_summary_is_the_plain_formulas() -> None:
    layers = attentions()
    summary = added(layers, batches=3).summary()
    both = torch.cat(layers, dim=1)  # [12, 5 mixtures, 5 cells]
    torch.testing.assert_close(summary.mean, both.mean(dim=0))
    assert summary.negative_share == pytest.approx(float((both < 0).float().mean()))
    p = both.abs() / both.abs().sum(dim=-1, keepdim=True)
    assert summary.entropy == pytest.approx(float(-(p * p.log()).sum(dim=-1).mean()), rel=1e-5)
    use = both.abs().mean(dim=0).sum(dim=0)
    share = use / use.sum()
    assert summary.effective_cells == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-5)
    assert summary.dead_cells == 1
    cosines = [
        float(torch.cosine_similarity(alpha[a].flatten(), alpha[b].flatten(), dim=0))
        for alpha in layers
        for a, b in itertools.combinations(range(12), 2)
    ]
    assert summary.similarity == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_a_static_attention_is_its_own_likeness() -> None:
    one_hot = torch.eye(5)[:3].expand(7, 3, 5)
    summary = added([one_hot]).summary()
    assert summary.similarity == pytest.approx(1.0)
    assert (summary.entropy, summary.negative_share, summary.dead_cells) == (0.0, 0.0, 2)
    assert summary.effective_cells == pytest.approx(3.0)


def test_mixtures_of_the_zero_cell_count_as_unused() -> None:
    alpha = torch.zeros(4, 2, 5)
    alpha[:, 0, 1] = 1.0
    summary = added([alpha]).summary()
    assert (summary.entropy, summary.dead_cells) == (0.0, 4)
    assert summary.effective_cells == pytest.approx(1.0)


def test_states_of_two_processes_add_up() -> None:
    layers = attentions()
    whole, first, second = added(layers), added([a[:4] for a in layers]), added([a[4:] for a in layers])
    for name in first._defaults:
        assert first._reductions[name] is whole._reductions[name]
        setattr(first, name, first._reductions[name](torch.stack([getattr(first, name), getattr(second, name)])))
    found, expected = first.summary(), whole.summary()
    torch.testing.assert_close(found.mean, expected.mean)
    assert found.scalars() == pytest.approx(expected.scalars(), rel=1e-5)


def test_heat_map_colours() -> None:
    figure = heat_map(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]))
    (image,) = figure.axes[0].images
    (positive, zero), (negative, half) = (image.to_rgba(image.get_array()) * 255).round().tolist()
    assert max(abs(channel - 247) for channel in zero[:3]) < 2  # all but white
    assert positive[0] > 2 * positive[2]  # red
    assert negative[2] > 2 * negative[0]  # blue
    assert half[0] > half[2] > positive[2]
    assert image.get_clim() == (-1.0, 1.0)
    assert heat_map(torch.zeros(3, 3)).axes[0].images[0].norm(0.0) == 0.5


@pytest.mark.parametrize("cells", [1, 2, 4, 28, 700])
def test_cells_and_mixtures_have_whole_numbers(cells: int) -> None:
    axes = heat_map(torch.randn(2 * cells, cells)).axes[0]
    for axis, count in ((axes.xaxis, cells), (axes.yaxis, 2 * cells)):
        places = [place for place in axis.get_majorticklocs() if -0.5 <= place <= count - 0.5]
        assert places
        assert all(float(place).is_integer() for place in places)


def test_heat_map_parts_the_layers_and_marks_where_they_started() -> None:
    shares = partition([(8, 4, 1, 1), (4, 4, 1, 1), (4, 4, 1, 1)], Fraction(1, 2), out_ratio=Fraction(1, 2)).layers
    layers = dict(zip(("first", "$second_{", "third"), shares, strict=True))
    mixtures, cells = sum(share.mixtures for share in shares), shares[0].cells
    figure = heat_map(torch.randn(mixtures, cells), layers, vector=True)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(layers)
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    ends = [line.get_ydata()[0] for line in lines]
    assert ends == [shares[0].mixtures - 0.5, shares[0].mixtures + shares[1].mixtures - 0.5]
    (dots,) = (line for line in axes.lines if line.get_linestyle() == "None")
    initial = [cell for share in shares for cell in share.initial_cells]
    expected = [(cell, mixture) for mixture, cell in enumerate(initial) if cell < cells]
    assert list(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == expected
    pixels = picture(figure)  # its names are no mathematics
    assert pixels.shape[2] == 3
    assert pixels[0, 0].tolist() == [255, 255, 255]


class Shows(DummyLogger):
    """A logger with pictures, as Lightning's of W&B has them."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[str, tuple[int, ...], int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.shown.append((key, images[0].shape[2:], step))


def test_a_static_network_is_told_to_have_no_attention(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[AttentionStatistics()])
    with pytest.warns(UserWarning, match=r"AttentionStatistics found no warehouse in the network.*KWCallback"):
        run.fit(Classifier(), loader(), loader(samples=8))
    assert not (tmp_path / "attention").exists()


class Elsewhere(Shows):
    """A logger that keeps no files of its own in `save_dir`, as Lightning's of W&B and MLflow."""

    def __init__(self, folder: Path, version: str) -> None:
        super().__init__()
        self._folder, self._version = folder, version

    save_dir = property(lambda self: str(self._folder))
    name = property(lambda self: "project")
    version = property(lambda self: self._version)


def test_runs_of_a_logger_have_folders_of_their_own(tmp_path: Path) -> None:
    for version in ("first", "second"):
        logger = Elsewhere(tmp_path / "logs", version)
        run = trainer(tmp_path / "root", callbacks=[AttentionStatistics()], logger=logger)
        run.fit(Classifier(dynamic_net()), loader(), loader(samples=8))
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npz"))
    assert found == [f"logs/project/{version}/attention/epoch=0000-step=5.npz" for version in ("first", "second")]


def test_figures_reach_every_logger_that_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[Any, ...]] = []
    client = SimpleNamespace(log_image=lambda run, pixels, artifact_file: logged.append((run, artifact_file)))
    mlflow = object.__new__(MLFlowLogger)  # its own constructor wants the package
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "run-1")
    shows = Shows()
    publish([CSVLogger(tmp_path), mlflow, shows], {"attention/stage1": heat_map(torch.eye(3))}, 7)
    assert logged == [("run-1", "figures/attention/stage1-7.png")]
    assert shows.shown == [("attention/stage1", (3,), 7)]


def fit(folder: Path, statistics: AttentionStatistics, **options: Any) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(dynamic_net())
    set_temperature(model, 0.3)
    callbacks = [statistics, *options.pop("callbacks", [])]
    trainer(folder, callbacks=callbacks, **options).fit(model, loader(), loader(samples=16))
    return model


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m.attention._forward_hooks) for m in model.modules() if isinstance(m, KWLayer))


def test_numbers_and_matrices_of_a_run(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    statistics = AttentionStatistics(every_n_epochs=2)
    model = fit(tmp_path, statistics, logger=logger, max_epochs=4)
    written = sorted((Path(logger.log_dir) / "attention").iterdir())
    assert [path.name for path in written] == ["epoch=0001-step=10.npz", "epoch=0003-step=20.npz"]

    # The last pass once more, by hand.
    expected: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, KWLayer):
            layer.attention.register_forward_hook(
                lambda _module, _args, alpha, name=name: expected.setdefault(name, []).append(alpha)
            )
    model.eval()
    with torch.no_grad():
        for x, _ in loader(samples=16):
            model(x)
    arrays = np.load(written[-1])
    assert set(arrays) == {"convolutions", "convolutions/layers", "head", "head/layers"}
    assert arrays["convolutions/layers"].tolist() == ["net.conv1", "net.conv2"]
    for warehouse in ("convolutions", "head"):
        rows = [torch.cat(expected[name]).mean(dim=0) for name in arrays[f"{warehouse}/layers"]]
        np.testing.assert_allclose(arrays[warehouse], torch.cat(rows), atol=1e-6)

    header, *_, last = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), last.split(","), strict=True))
    names = {key for key in row if key.startswith("attention/")}
    assert names == {f"attention/{warehouse}/{name}" for warehouse in ("convolutions", "head") for name in SCALARS}
    for warehouse, summary in statistics.latest.items():
        for name, value in summary.scalars().items():
            assert float(row[f"attention/{warehouse}/{name}"]) == pytest.approx(value, rel=1e-5)
    assert 0 < statistics.latest["convolutions"].negative_share < 1


def test_heat_maps_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, AttentionStatistics(figures=True), logger=logger)
    (file,) = Path(logger.log_dir).glob("events.*")
    values = {
        value.tag: (event.step, value) for event in EventFileLoader(str(file)).Load() for value in event.summary.value
    }
    assert {"attention/convolutions/entropy", "attention/head/entropy", "attention/head"} <= values.keys()
    step, value = values["attention/convolutions"]
    assert step == 5
    assert value.metadata.plugin_data.plugin_name == "images"
    assert value.tensor.string_val[2].startswith(b"\x89PNG")  # after the picture's width and height


class CountHooks(Callback):
    def __init__(self) -> None:
        self.training: set[int] = set()
        self.validation: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.training.add(hooks(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validation.append(hooks(pl_module))


def test_it_listens_only_when_due(tmp_path: Path) -> None:
    count = CountHooks()
    model = fit(tmp_path, AttentionStatistics(every_n_epochs=2), callbacks=[count], max_epochs=2)
    assert count.training == {0}
    assert count.validation == [0, 0, 0, 0, 3, 3]  # sanity check, first epoch, second epoch
    assert hooks(model) == 0
    assert [path.name for path in (tmp_path / "attention").iterdir()] == ["epoch=0001-step=10.npz"]


def test_an_error_in_validation_leaves_no_hooks(tmp_path: Path) -> None:
    model = Classifier(dynamic_net())

    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    model.validation_step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more"):
        trainer(tmp_path, callbacks=[AttentionStatistics()]).validate(model, loader())
    assert hooks(model) == 0


def test_validate_alone_and_its_state(tmp_path: Path) -> None:
    statistics = AttentionStatistics(every_n_epochs=0, folder=tmp_path / "elsewhere")
    run = trainer(tmp_path, callbacks=[statistics])
    (metrics,) = run.validate(Classifier(dynamic_net()), loader(), verbose=False)
    assert metrics["attention/head/dead_cells"] == statistics.latest["head"].dead_cells
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["epoch=0000-step=0.npz"]
    other = AttentionStatistics()
    other.load_state_dict(statistics.state_dict())
    assert other.latest["head"].scalars() == statistics.latest["head"].scalars()


def test_a_compiled_network_is_heard_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = dynamic_net()
    plain, compiled = AttentionStatistics(), AttentionStatistics()
    trainer(tmp_path, callbacks=[plain]).validate(Classifier(net), loader(), verbose=False)
    model = Classifier(torch.compile(net, backend="eager"))
    model(torch.zeros(8, 1, 8, 8))  # compiled before there are any hooks
    trainer(tmp_path, callbacks=[compiled]).validate(model, loader(), verbose=False)
    assert compiled.latest["head"].scalars() == plain.latest["head"].scalars()


def test_two_networks_with_warehouses_of_one_name(tmp_path: Path) -> None:
    model = Classifier(dynamic_net())
    model.teacher = dynamic_net()
    statistics = AttentionStatistics()
    statistics.listen(model)
    for network in (model.net, model.teacher):
        network(torch.randn(4, 1, 8, 8))
    summaries = statistics.summaries()
    assert set(summaries) == {"convolutions", "head", "teacher.conv1:convolutions", "teacher.head:head"}
    assert hooks(model) == 0


def test_what_is_not_in_use_is_left_out(tmp_path: Path) -> None:
    layers = attentions()
    whole, first = AttentionMetric([3, 2], cells=5), added(layers[:1]).summary()
    whole.update(0, layers[0])
    found = whole.summary()
    assert (found.entropy, found.negative_share) == (first.entropy, first.negative_share)

    class Part(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net.conv1(self.net.stem(batch[0]))

    statistics = AttentionStatistics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The ``compute`` method")
        trainer(tmp_path, callbacks=[statistics]).validate(Part(dynamic_net()), loader(), verbose=False)
    assert set(statistics.latest) == {"convolutions"}
    assert set(np.load(tmp_path / "attention" / "epoch=0000-step=0.npz")) == {"convolutions", "convolutions/layers"}


class TwoNetworks(Classifier):
    """A generator and a discriminator, say: two networks, each with statistics of its own."""

    def __init__(self) -> None:
        super().__init__(dynamic_net())
        self.other = dynamic_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x)


def test_statistics_of_two_networks_side_by_side(tmp_path: Path) -> None:
    callbacks = [AttentionStatistics(module=name) for name in ("net", "other")]
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(TwoNetworks(), loader(), loader(samples=16))
    for statistics in callbacks:
        place = f"attention/{statistics.module}"
        for name, summary in statistics.latest.items():
            assert float(run.callback_metrics[f"{place}/{name}/entropy"]) == pytest.approx(summary.entropy)
            written = np.load(tmp_path / place / "epoch=0000-step=5.npz")[name]
            np.testing.assert_array_equal(written, summary.mean.numpy())
    graphs: list[GraphModule] = []
    torch.compile(nn.Linear(2, 2), backend=lambda graph, _: graphs.append(graph) or graph.forward)(torch.zeros(1, 2))
    assert graphs  # both have stopped listening, so networks are compiled again


def test_a_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    statistics = AttentionStatistics()
    fit(tmp_path, statistics, fast_dev_run=True)
    assert set(statistics.latest) == {"convolutions", "head"}
    assert not list(tmp_path.iterdir())


def test_a_negative_number_of_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^found every_n_epochs -1, allowed: a whole number of at least 0$"):
        AttentionStatistics(every_n_epochs=-1)
