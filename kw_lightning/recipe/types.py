"""The typed form of a recipe: frozen dataclasses, without torch and without YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from kw_lightning.errors import Location, Problem
from kw_lightning.notebook import text_html
from kw_lightning.recipe.writing import to_yaml

Reach = Literal["network", "stage", "block", "layer"]


@dataclass(frozen=True)
class SourceFile:
    """A file that a recipe came from.

    Attributes:
        file: its name, as the recipe or the user gave it.
        sha256: hash of its bytes.
        package: the distribution it belongs to, None for a file of one's own.
        version: of that distribution.
    """

    file: str
    sha256: str
    package: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Document:
    """The plain data of a recipe, resolved, and where each value of it stands.

    Attributes:
        data: maps, lists, strings, numbers, booleans and None, after `extends`, `vars` and overrides.
        locations: key path (`warehouses.stage1.layers[0]`) → place. A path that is not there takes its parent's.
        source: what the recipe was read from, for messages.
        sources: the files it came from, the recipe itself last; none when it came from Python.
        overrides: the `key=value` that were laid over it.
    """

    data: Mapping[str, Any]
    locations: Mapping[str, Location] = field(default_factory=dict)
    source: str = "<recipe>"
    sources: tuple[SourceFile, ...] = ()
    overrides: tuple[str, ...] = ()

    def location(self, path: str) -> Location | None:
        """Return the place of `path`, or of the nearest enclosing value that has one."""
        while path:
            if path in self.locations:
                return self.locations[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.locations.get("")

    def problem(self, path: str, message: str) -> Problem:
        """Return a problem placed at `path`."""
        return Problem(message, path, self.location(path))


@dataclass(frozen=True)
class Budget:
    """How many cells a warehouse gets: exactly one of the fields is set.

    Attributes:
        ratio: cells per mixture, b = n / m_t (the paper's convolutional parameter budget).
        cells: the number n itself.
        parameters: parameters of cells and attention together, at most.
        relative: of a whole recipe, parameters relative to the static network's.
    """

    ratio: Fraction | None = None
    cells: int | None = None
    parameters: int | None = None
    relative: Fraction | None = None


@dataclass(frozen=True)
class Cell:
    """The size of a cell as fractions of the common divisors of the channels (paper, section 3.2)."""

    out: Fraction = Fraction(1)
    in_: Fraction = Fraction(1)
    spatial: Literal["split", "whole"] = "split"


@dataclass(frozen=True)
class SoftmaxTemperature:
    """The annealing of the softmax's own temperature; without `epochs` in a tenth of the run."""

    start: float = 30.0
    end: float = 1.0
    epochs: float | None = None


@dataclass(frozen=True)
class Attention:
    """The attention of every layer of a warehouse.

    Attributes:
        reduction: hidden width relative to the input channels.
        norm: between the two linear layers.
        basis: the low-rank form's ratio, None when off.
        start: what each mixture starts as: a cell of its own, a cell that several start as, or nothing in particular.
        function: from the small network's numbers to the weights of the cells.
        softmax_temperature: of the softmax; None where it stays 1.
        gates: which channels of the layers have gates.
        at_most: most parameters relative to the cells'; None warns of more than 1 and has a bound of its own.
    """

    reduction: Fraction = Fraction(1, 16)
    norm: Literal["batch", "layer"] = "batch"
    basis: Fraction | None = None
    start: Literal["own", "shared", "none"] = "own"
    function: Literal["contrast", "softmax", "sigmoid", "relu"] = "contrast"
    softmax_temperature: SoftmaxTemperature | None = None
    gates: tuple[Literal["input", "output"], ...] = ()
    at_most: float | None = None


@dataclass(frozen=True)
class Selector:
    """Which layers of a network are meant: every condition given must hold.

    Attributes:
        name: a name or glob over `named_modules()`; a slice like `[2/3:]` at its end is in `part`.
        type: the layer's class name, as `Conv2d`.
        kernel_size: the kernel's size in every spatial dimension.
        min_channels: least number of input and of output channels.
        exclude: globs of layers that are left static.
        part: output channels (from, to) as fractions of all, for a part of a fused layer.
        path: key path in the recipe, for messages.
    """

    name: str = "*"
    type: str | None = None
    kernel_size: tuple[int, ...] | None = None
    min_channels: int | None = None
    exclude: tuple[str, ...] = ()
    part: tuple[Fraction, Fraction] | None = None
    path: str = ""


@dataclass(frozen=True)
class Adapter:
    """A low-rank dynamic layer beside each layer of a warehouse, which stays, frozen.

    Attributes:
        rank: channels between its two halves.
        train: names or globs of what else of the network is trained; all else is frozen.
    """

    rank: int = 16
    train: tuple[str, ...] = ()


@dataclass(frozen=True)
class Warehouse:
    """One warehouse of the recipe, the recipe's `defaults` already filled in.

    `batch_dim` is the dimension of the batch in the input of its linear layers; None, where nothing is said, means 0.
    Where it is not `dynamic` the weights of its cells are learnt as they are, alike for all samples.
    """

    name: str
    layers: tuple[Selector, ...]
    budget: Budget = Budget(ratio=Fraction(1))
    cell: Cell = Cell()
    attention: Attention = Attention()
    path: str = ""
    batch_dim: int | None = None
    dynamic: bool = True
    adapter: Adapter | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the warehouses that the network has for it: its own, or those of an adapter's halves."""
        return (self.name,) if self.adapter is None else (f"{self.name}-down", f"{self.name}-up")


@dataclass(frozen=True)
class Stages:
    """`stages: auto`: warehouses found from the network's feature-map sizes (`planning/stages.py` says how).

    Attributes:
        sharing: how far a warehouse reaches; None means a stage, divided where its attention would outweigh its cells.
        split: what keeps layers apart besides; kinds of layers are apart in either case.
        handover: whether layers that lead into a stage belong to the stage before, as in the paper.
        exclude: globs of layers that stay static.
    """

    sharing: Reach | None = None
    split: Literal["type", "kernel_size"] = "type"
    handover: bool = True
    exclude: tuple[str, ...] = ()
    budget: Budget = Budget(ratio=Fraction(1))
    cell: Cell = Cell()
    attention: Attention = Attention()
    dynamic: bool = True
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Model:
    """The network: a backbone by name, or layers in the recipe, or both one after the other.

    Attributes:
        backbone: `torchvision/NAME`, `timm/NAME`, `python:pkg.module:callable`, or None.
        args: keyword arguments of the backbone's constructor.
        pretrained: False, True, a weights name, a path, or "published" for the authors' checkpoint.
        input: [channels, *size] of one sample; None means the backbone's usual one.
        layers, blocks: the Keras-style network as plain data (read by `kw_lightning.keras`).
        budget: a budget for all warehouses together, or None.
    """

    backbone: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool | str = False
    input: tuple[int, ...] | None = None
    layers: tuple[Any, ...] = ()
    blocks: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None


@dataclass(frozen=True)
class Temperature:
    """The annealing of the attention's temperature; over `epochs` or `steps`, whichever is set.

    Without `start` it runs from 1, or from 0 after a warm start with a budget under 1.
    """

    start: float | None = None
    end: float = 0.0
    epochs: float | None = None
    steps: int | None = None
    shape: Literal["linear", "cosine", "constant"] = "linear"


@dataclass(frozen=True)
class Data:
    """A data set by name and how it is read; `train` and `eval` are the two transform sections.

    Attributes:
        labels: whether an image is of one class, or of any number of them.
        broken: whether an image file that cannot be read ends the run, or is left out.
        sampling: "each" trains with every image once an epoch; "balanced" with as many images, drawn so that all
            classes come equally often.
        validation: share of the training images that validates, where the data has no validation part; None takes none.
        test: whether the test part is opened at the end of training, once; not while settings are still being chosen.
    """

    name: str
    root: str | None = None
    labels: Literal["one", "several"] = "one"
    batch_size: int = 128
    eval_batch_size: int | None = None
    workers: int = 0
    validation: Fraction | None = Fraction(1, 10)
    test: bool = True
    broken: Literal["refuse", "skip"] = "refuse"
    sampling: Literal["each", "balanced"] = "each"
    args: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """Layers with a learning rate of their own: `lr`, **or** `times` the optimizer's where that is None."""

    layers: tuple[str, ...]
    lr: float | None = None
    times: float = 1.0


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of `torch.optim` by name; `args` are its other keyword arguments.

    Attributes:
        no_decay: None decays every parameter; else biases and parameters with one dimension are not decayed, nor is
            what these globs mean.
        groups: layers with another learning rate; the first that means a parameter has it.
    """

    name: str = "AdamW"
    lr: float = 1e-3
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] | None = None
    groups: tuple[ParameterGroup, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run: warm-up, then the shape down to `final_lr`."""

    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """What training makes small: cross entropy over the classes, or for every class a yes or no of its own.

    Attributes:
        name: `bce` is binary cross entropy.
        gamma: of `focal`: how much less an answer counts the surer and righter it is.
        alpha: of `focal`: weight of a yes, that of a no being 1 - alpha; None weighs both the same, with 1.
    """

    name: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    gamma: float = 2.0
    alpha: float | None = 0.25


@dataclass(frozen=True)
class Distillation:
    """A trained network whose answers are targets too.

    Attributes:
        teacher: a run, a checkpoint or a saved network.
        weight: share of its part in the loss; the rest is that of the data.
        temperature: by which the answers of both networks are softened.
    """

    teacher: str
    weight: float = 0.5
    temperature: float = 2.0


@dataclass(frozen=True)
class Average:
    """An exponential moving average of the weights (Lightning's EMAWeightAveraging)."""

    decay: float = 0.9999
    start_epoch: int = 0


@dataclass(frozen=True)
class EarlyStop:
    """The end of a run whose monitored metric has not got better by more than `min_delta` for `patience` epochs."""

    patience: int = 10
    min_delta: float = 0.0


@dataclass(frozen=True)
class CheckpointEvery:
    """How often `last.ckpt` is written inside an epoch, by minutes **or** optimizer steps, whichever is set."""

    minutes: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Train:
    """How the network is trained.

    Attributes:
        class_weights: how much each class counts in the loss: by name, 1 where it is not named, **or** so that all
            classes count the same together; None for 1.
        batch_size: "auto" finds `data.batch_size`; None takes it as it is.
        freeze: globs of layers that stay as they are, for `freeze_epochs` or, where that is None, the whole run.
    """

    epochs: int = 1
    max_steps: int | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    distill: Distillation | None = None
    freeze: tuple[str, ...] = ()
    freeze_epochs: int | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    gradient_clip: float | None = None
    accumulate: int = 1
    ema: Average | None = None
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: str | int = "auto"
    strategy: str = "auto"
    nodes: int = 1
    compile: bool | str = False
    deterministic: bool = False
    seed: int = 0
    monitor: str = "val/accuracy"
    checkpoint_every: CheckpointEvery | None = None
    early_stop: EarlyStop | None = None
    channels_last: bool = False
    batch_size: Literal["auto"] | None = None


@dataclass(frozen=True)
class OwnCallback:
    """A callback of one's own: `python:package.module:callable` and its keyword arguments."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Log:
    """What a run writes besides its metrics; `trackers` are `wandb`, `mlflow` and `trackio` with their arguments."""

    attention_every_n_epochs: int = 0
    attention_figures: bool = False
    report: bool = True
    tensorboard: bool = True
    trackers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    every_n_steps: int = 50


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked against the schema; what needs the network is checked by the plan."""

    name: str
    document: Document
    description: str = ""
    model: Model | None = None
    warehouses: tuple[Warehouse, ...] = ()
    stages: Stages | None = None
    temperature: Temperature = Temperature()
    engine: str = "auto"
    epilogue: bool = True
    data: Data | None = None
    train: Train | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[OwnCallback, ...] = ()
    log: Log = Log()

    @property
    def several(self) -> bool:
        """Return whether an image may be of several classes at once, or of none."""
        return self.data is not None and self.data.labels == "several"

    def _repr_html_(self) -> str:
        return text_html(
            f"{self.name}: {self.description}" if self.description else self.name, to_yaml(self.document.data)
        )
