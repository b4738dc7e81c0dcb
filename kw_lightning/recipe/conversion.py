"""Checked plain data → the frozen dataclasses of `kw_lightning.recipe.types`, which hold all defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kw_lightning.recipe.checks import split_slice
from kw_lightning.recipe.scalars import read_ratio, read_size
from kw_lightning.recipe.types import (
    Adapter,
    Attention,
    Average,
    Budget,
    Cell,
    CheckpointEvery,
    Data,
    Distillation,
    Document,
    EarlyStop,
    Log,
    Loss,
    Model,
    Optimizer,
    OwnCallback,
    ParameterGroup,
    Recipe,
    Schedule,
    Selector,
    SoftmaxTemperature,
    Stages,
    Temperature,
    Train,
    Warehouse,
)

Values = Mapping[str, Any]
_TRACKERS = ("wandb", "mlflow", "trackio")
_OPTIMIZER_ARGUMENTS = ("momentum", "nesterov", "betas", "eps")


def convert(data: Values, document: Document) -> Recipe:
    """Return the typed recipe of data that the schema and the checks have passed."""
    defaults = data.get("defaults", {})
    several = data.get("data", {}).get("labels") == "several"
    return Recipe(
        name=data["name"],
        document=document,
        description=data.get("description", ""),
        model=_model(data["model"]) if "model" in data else None,
        warehouses=tuple(_warehouse(name, entry, defaults) for name, entry in data.get("warehouses", {}).items()),
        stages=_stages(data["stages"], defaults) if "stages" in data else None,
        temperature=Temperature(**_take(data.get("temperature", {}), start=float, end=float)),
        engine=data.get("engine", Recipe.engine),
        epilogue=data.get("epilogue", Recipe.epilogue),
        data=Data(**_take(data["data"], validation=_or_none(read_ratio))) if "data" in data else None,
        train=_train(data.get("train", {}), several=several) if "train" in data or several else None,
        trainer=data.get("trainer", {}),
        callbacks=tuple(map(_callback, data.get("callbacks", ()))),
        log=_log(data.get("log", {})),
    )


def _take(data: Values, **readers: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a map's entries as keyword arguments, those with a reader read by it."""
    return {key: readers[key](value) if key in readers else value for key, value in data.items()}


def _only(data: Values, *keys: str) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}


def _or_none(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value == "none" else reader(value)


def _budget(value: Any) -> Budget:
    if not isinstance(value, Mapping):
        return Budget(ratio=read_ratio(value))
    return Budget(**_take(value, cells=int, parameters=read_size, relative=read_ratio))


def _cell(data: Values) -> Cell:
    shares = {"out": "out", "in": "in_"}
    sides: dict[str, Any] = {name: read_ratio(data[key]) for key, name in shares.items() if key in data}
    return Cell(**sides, **_only(data, "spatial"))


def _attention(data: Values) -> Attention:
    return Attention(
        **_take(
            data,
            reduction=read_ratio,
            basis=_or_none(read_ratio),
            softmax_temperature=lambda entry: SoftmaxTemperature(**_take(entry, start=float, end=float, epochs=float)),
            gates=tuple,
            at_most=float,
        )
    )


def _shared(entry: Values, defaults: Values) -> dict[str, Any]:
    """Return what a warehouse and the defaults both may say; cell and attention key by key over the defaults."""
    return {
        "budget": _budget(entry.get("budget", defaults.get("budget", 1))),
        "cell": _cell({**defaults.get("cell", {}), **entry.get("cell", {})}),
        "attention": _attention({**defaults.get("attention", {}), **entry.get("attention", {})}),
        "dynamic": entry.get("dynamic", defaults.get("dynamic", True)),
        "adapter": _adapter(entry.get("adapter"), defaults.get("adapter")),
    }


def _adapter(own: Any, defaults: Any) -> Adapter | None:
    """Return an adapter, key by key over the defaults; `none` is none, whatever the defaults say."""
    given = [entry for entry in (defaults, own) if isinstance(entry, Mapping)]
    if own == "none" or not given:
        return None
    return Adapter(**_take({key: value for entry in given for key, value in entry.items()}, rank=int, train=tuple))


def _warehouse(name: str, entry: Values, defaults: Values) -> Warehouse:
    path = f"warehouses.{name}"
    selectors = (_selector(value, f"{path}.layers[{index}]") for index, value in enumerate(entry.get("layers", ())))
    own = _only(entry, "batch_dim")
    return Warehouse(name=name, layers=tuple(selectors), path=path, **own, **_shared(entry, defaults))


def _selector(value: Any, path: str) -> Selector:
    conditions = {"name": value} if isinstance(value, str) else dict(value)
    name, part = split_slice(conditions.pop("name", "*"))
    return Selector(name=name, part=part, path=path, **_take(conditions, kernel_size=_numbers, exclude=tuple))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in value) if isinstance(value, list) else (int(value),)


def _stages(value: Any, defaults: Values) -> Stages:
    entry = {} if value == "auto" else value
    return Stages(
        **_take(_only(entry, "sharing", "split", "handover", "exclude"), exclude=tuple), **_shared(entry, defaults)
    )


def _model(data: Values) -> Model:
    return Model(**_take(data, input=_numbers, layers=tuple, budget=_budget))


def _optimizer(data: Values) -> Optimizer:
    own = _take(
        _only(data, "name", "lr", "weight_decay", "no_decay", "groups"),
        lr=float,
        weight_decay=float,
        no_decay=_no_decay,
        groups=lambda groups: tuple(map(_group, groups)),
    )
    named = _only(data, *_OPTIMIZER_ARGUMENTS)
    return Optimizer(**own, args={**named, **data.get("args", {})})


def _no_decay(value: Any) -> tuple[str, ...] | None:
    return None if value == "none" else () if value == "vectors" else tuple(value)


def _group(data: Values) -> ParameterGroup:
    layers, lr = data["layers"], data["lr"]
    rate = {"times": float(lr[:-1])} if isinstance(lr, str) else {"lr": float(lr)}
    return ParameterGroup((layers,) if isinstance(layers, str) else tuple(layers), **rate)


def _train(data: Values, *, several: bool) -> Train:
    readers: dict[str, Callable[[Any], Any]] = {
        "optimizer": _optimizer,
        "schedule": lambda entry: Schedule(**_take(entry, warmup_epochs=float, final_lr=float)),
        "loss": _loss,
        "class_weights": _class_weights,
        "distill": _or_none(lambda entry: Distillation(**_take(entry, weight=float, temperature=float))),
        "freeze": tuple,
        "gradient_clip": _or_none(float),
        "ema": _or_none(lambda entry: Average(**_take(entry, decay=float))),
        "checkpoint_every": _or_none(lambda entry: CheckpointEvery(**_take(entry, minutes=float))),
        "early_stop": _or_none(lambda entry: EarlyStop(**_take(entry, min_delta=float))),
        **dict.fromkeys(("label_smoothing", "mixup", "cutmix"), float),
    }
    usual = {"loss": Loss("bce"), "monitor": "val/map"} if several else {}
    return Train(**{**usual, **_take(data, **readers)})


def _loss(value: Any) -> Loss:
    if isinstance(value, str):
        return Loss(value)  # type: ignore[arg-type]  # the schema knows the names
    return Loss("focal", **_take(value["focal"], gamma=float, alpha=_or_none(float)))


def _class_weights(value: Any) -> Any:
    if isinstance(value, str):
        return None if value == "none" else value
    return {name: float(weight) for name, weight in value.items()}


def _callback(value: Any) -> OwnCallback:
    if isinstance(value, str):
        return OwnCallback(value)
    ((name, args),) = value.items()
    return OwnCallback(name, args)


def _log(data: Values) -> Log:
    own = {key: value for key, value in data.items() if key not in ("attention", *_TRACKERS)}
    attention = {f"attention_{key}": value for key, value in data.get("attention", {}).items()}
    return Log(**own, **attention, trackers=_only(data, *_TRACKERS))
