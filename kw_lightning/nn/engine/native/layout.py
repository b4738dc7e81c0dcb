"""The structures that Python passes to C; pass.h describes their fields.

Only the order of bytes ties the two declarations together, and a field too many on one side would silently corrupt
memory. So the library reports where its fields lie, and is not used if the two disagree.
"""

from __future__ import annotations

import ctypes


class Windows(ctypes.Structure):
    """See winograd.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dimensions", "reach")),
        *((name, ctypes.c_int32 * 3) for name in ("size", "count", "first")),
    )


class Map(ctypes.Structure):
    """See pass.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "channel", "position", "positions")),
    )


class Epilogue(ctypes.Structure):
    """See epilogue.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "bias", "mean", "variance", "weight", "shift")),
        ("added", Map),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("present", ctypes.c_int64),
    )


class Walk(ctypes.Structure):
    """See pass.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("out", "source", "lines", "before", "room", "strip", "held")),
        *((name, ctypes.c_int64) for name in ("taps", "phases")),
        *((name, ctypes.c_void_p) for name in ("reads", "range", "phase")),
    )


class Pass(ctypes.Structure):
    """See pass.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "rows", "cells")),
        *((name, ctypes.c_int64) for name in ("groups", "cell_groups")),
        *((name, ctypes.c_int64) for name in ("lanes", "depths", "lane_groups", "depth_groups")),
        *((name, ctypes.c_int64) for name in ("row_tap", "row_group", "row_lane", "row_depth")),
        *((name, ctypes.c_int64) for name in ("cell_step", "group_step", "lane_step", "depth_step")),
        *((name, ctypes.c_int64) for name in ("out_positions", "source_positions")),
        *((name, Map) for name in ("out", "source", "other")),
        ("epilogue", Epilogue),
        *((name, Windows) for name in ("out_windows", "source_windows", "other_windows")),
        *((name, ctypes.c_int64) for name in ("taps", "tiles", "spans")),
        *((name, ctypes.c_void_p) for name in ("tile_start", "tile", "reads", "span", "run")),
        *((name, Walk) for name in ("walk", "kernel_walk")),
        *((name, ctypes.c_int64) for name in ("vectors", "direct")),
        *((name, ctypes.c_int64) for name in ("block_depths", "kernel_depths", "tile_depths", "mixed_samples")),
        *((name, ctypes.c_int64) for name in ("lines", "read_samples", "parts", "threads")),
        *((name, ctypes.c_int64) for name in ("ranks", "kept_filled")),
        *((name, ctypes.c_void_p) for name in ("base", "kept")),
        *((name, ctypes.c_void_p) for name in ("alpha", "cell", "alpha_gradient", "cell_gradient")),
        ("adds", ctypes.c_int64),
        ("memory", ctypes.c_void_p),
    )


class Hidden(ctypes.Structure):
    """See attention.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "width", "threads", "statistics")),
        *((name, ctypes.c_double) for name in ("epsilon", "momentum")),
        ("x", Map),
        *((name, ctypes.c_void_p) for name in ("pooled", "reduce", "bias", "scale", "shift", "mean", "variance")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_variance", "raw", "hidden", "gradient")),
        *((f"{name}_gradient", ctypes.c_void_p) for name in ("scale", "shift", "x", "reduce", "bias")),
    )


class Weighing(ctypes.Structure):
    """See attention.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "mixtures", "cells", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "temperature", "initial")),
        *((name, ctypes.c_void_p) for name in ("alpha", "sizes")),
        *((name, ctypes.c_void_p) for name in ("hidden_gradient", "weight_gradient", "bias_gradient", "memory")),
    )


class Evaluation(ctypes.Structure):
    """See evaluation.h."""

    _fields_ = (
        ("hidden", Hidden),
        ("weighing", Weighing),
        ("pass", Pass),
        *((name, ctypes.c_int64) for name in ("method", "positions")),
        ("live", ctypes.c_void_p),
        ("stored", ctypes.c_int64),
    )


class Tensors(ctypes.Structure):
    """See training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "kept", "memory")),
        ("momentum", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("cells", "reduce", "reduce_bias", "scale", "shift", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("temperature", "initial", "running_mean", "running_variance")),
        *((name, ctypes.c_void_p) for name in ("gradient", "x_gradient")),
        ("adds", ctypes.c_int64),
        *((f"{name}_gradient", ctypes.c_void_p) for name in ("cell", "reduce", "reduce_bias", "scale", "shift")),
        *((f"{name}_gradient", ctypes.c_void_p) for name in ("weight", "bias")),
    )


class _Field(ctypes.Structure):
    """See layout.c."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("bytes", ctypes.c_int64))


def difference(loaded: ctypes.CDLL) -> str | None:
    """Return the first difference between a library's structures and these, None if there is none."""
    found = ctypes.POINTER(_Field)()
    loaded.kw_layout.restype = ctypes.c_int64
    count = loaded.kw_layout(ctypes.byref(found))
    theirs = {found[index].name.decode(): (found[index].offset, found[index].bytes) for index in range(count)}
    structures = Windows, Map, Epilogue, Walk, Pass, Hidden, Weighing, Evaluation, Tensors
    ours = {name: place for structure in structures for name, place in _places(structure)}
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            here, there = (_told(places.get(name)) for places in (ours, theirs))
            return f"{name} is {there} in the library, and {here} in layout.py"
    return None


def _places(structure: type[ctypes.Structure]) -> list[tuple[str, tuple[int, int]]]:
    """Return (offset, bytes) of every field by name, and last of the whole, since a field says more of a difference."""
    fields = [getattr(structure, name) for name, *_ in structure._fields_]
    named = zip((f"{structure.__name__}.{name}" for name, *_ in structure._fields_), fields, strict=True)
    places = [(name, (field.offset, field.size)) for name, field in named]
    return [*places, (structure.__name__, (0, ctypes.sizeof(structure)))]


def _told(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"{place[1]} bytes at {place[0]}"
