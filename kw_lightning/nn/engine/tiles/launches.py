"""Launching the kernels: numbers of a convolution as they take them, and the sizes of their tiles."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.tiles.walks import Walk, backward_walks, forward_walk, is_pointwise, two_sides
from kw_lightning.nn.partition import Shape

_logger = logging.getLogger(__name__)

# Bytes of shared memory that a program of the smaller GPUs may have.
SHARED = 99 * 1024
# Those from which on 4 warps take a tile of 128 by 128. Hopper's tensor cores read operands from shared memory; earlier
# ones read them from registers, of which 4 warps would then have too few.
HOPPER = 200 * 1024
# Positions of the maps that are one tile: the gradient of their kernels is one product for every kernel position.
ONE_TILE = 64


class Tiles(NamedTuple):
    """How a kernel cuts its products.

    Attributes:
        positions, outputs, inputs: of a tile, powers of 2 of at least 16.
        warps: that compute one.
        stages: tiles of operands in flight.
    """

    positions: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class Weights(NamedTuple):
    """What a kernel position and the channels add to the place of a number in a sample's kernel.

    Attributes:
        sample: numbers of a sample's kernel.
        tap: what one kernel position adds.
        outputs, inputs: (channels of a cell, what a group of them adds).
    """

    sample: int
    tap: int
    outputs: tuple[int, int]
    inputs: tuple[int, int]

    @classmethod
    def of(cls, convolution: Convolution) -> Weights:
        """Return the places in mixtures [positions, output groups, input groups, *positions of the cell, co, ci]."""
        _, out_groups, in_groups = convolution.grid
        co, ci, *cell = convolution.cell_shape
        positions = math.prod(cell)  # 1, or all of the kernel
        block = positions * co * ci
        tap = co * ci if positions > 1 else out_groups * in_groups * block
        return cls(math.prod(convolution.kernel_shape), tap, (co, in_groups * block), (ci, block))


@functools.cache
def missing() -> str | None:
    """Return why nothing can be launched here, None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which comes with PyTorch for GPUs on Linux"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return _failure()


def _failure() -> str | None:
    """Return why a small kernel cannot be launched, which is said once: Triton compiles C, which takes a compiler."""
    try:
        z = torch.ones(1, 1, 2, device="cuda")
        initial, alpha = z.new_zeros(1, dtype=torch.int64), torch.empty_like(z)
        start("weigh", 1, z, z, initial, z, alpha, 1, 1, 1, COLUMNS=32, num_warps=1)
    except Exception as error:  # whatever keeps it from compiling, the other paths compute as well
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _logger.warning("Triton's kernels are not in use, dynamic layers are slower without: %s", lines[0])
        return f"Triton launches nothing here ({lines[0]})"
    return None


def device_type() -> str:
    """Return where the kernels compute."""
    return "cpu" if interpreted() else "cuda"


@functools.cache
def interpreted() -> bool:
    """Return whether Triton computes on the CPU, to find mistakes: TRITON_INTERPRET=1 when it is first used."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """How a kernel is launched, but for its tensors and the batch.

    Attributes:
        programs: that one sample takes.
        numbers: of the convolution, in the order in which the kernel takes them.
        constants: that it is compiled for.
    """

    programs: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]


def convolve(x: Tensor, weights: Tensor, y: Tensor, convolution: Convolution, tiles: Tiles | None = None) -> None:
    """Write the convolution of every sample with its own kernel.

    Args:
        x: [batch, *size, in_channels], contiguous as all tensors here.
        weights: [batch, numbers of a kernel], see `Weights`.
        y: [batch, *output_size, out_channels], overwritten.
    """
    machine = x.element_size(), _shared(x.device), _precision()
    _launch("convolve", _forward(convolution, tuple(x.shape[1:-1]), tiles, *machine), x, weights, y)


def convolve_back(
    gradient: Tensor, weights: Tensor, x: Tensor, convolution: Convolution, tiles: Tiles | None = None
) -> None:
    """Write the gradient of the input: of its phases, each a convolution of the output's gradient.

    Args:
        gradient: [batch, *output_size, out_channels].
        weights: [batch, numbers of a kernel].
        x: [batch, *size, in_channels], overwritten.
    """
    machine = x.element_size(), _shared(x.device), _precision()
    for launch in _backward(convolution, tuple(x.shape[1:-1]), tiles, *machine):
        _launch("convolve", launch, gradient, weights, x)


def correlate(
    x: Tensor, gradient: Tensor, weights: Tensor, convolution: Convolution, tiles: Tiles | None = None
) -> None:
    """Write the gradient of every sample's kernel.

    Args:
        x: [batch, *size, in_channels].
        gradient: [batch, *output_size, out_channels].
        weights: [batch, numbers of a kernel], overwritten.
    """
    machine = x.element_size(), _shared(x.device), _precision()
    _launch("correlate", _correlation(convolution, tuple(x.shape[1:-1]), tiles, *machine), x, gradient, weights)


@functools.lru_cache(maxsize=1024)
def convolving_tiles(positions: int, outputs: int, inputs: int, itemsize: int = 2, shared: int = SHARED) -> Tiles:
    """Return the tiles of a convolution: near the fastest of seven on 15 layers of ResNets, on an NVIDIA H200.

    Args:
        positions, outputs, inputs: of a sample's product.
        itemsize: bytes of a number.
        shared: bytes of memory that a program has for its operands.
    """
    m, stages = (128, 3) if positions > ONE_TILE else (64, 4)
    n = _power(outputs, 16, 128)
    return _fit(Tiles(m, n, _power(inputs, 16, 64), _warps(m, n, shared), stages), "inputs", itemsize, shared)


@functools.lru_cache(maxsize=1024)
def correlating_tiles(positions: int, outputs: int, inputs: int, itemsize: int = 2, shared: int = SHARED) -> Tiles:
    """Return the tiles of a gradient of kernels, whose sums go over the positions; as `convolving_tiles`."""
    n, k = _power(outputs, 16, 128), _power(inputs, 16, 128)
    if positions > ONE_TILE:
        return _fit(Tiles(32, n, k, _warps(n, k, shared), 5), "positions", itemsize, shared)
    m = _power(positions, 16, ONE_TILE)
    return _fit(Tiles(m, n, k, 8 if n * k > 128 * 64 else 4, 3), "positions", itemsize, shared)


def _warps(rows: int, columns: int, shared: int) -> int:
    return 8 if rows * columns > 128 * 64 and shared < HOPPER else 4


def depthwise_tiles(channels: int) -> Tiles:
    """Return the tiles of a depthwise convolution and of its gradients."""
    return Tiles(64, _power(channels, 16, 64), 1, 4, 2)


def is_depthwise(convolution: Convolution) -> bool:
    """Return whether every channel is convolved by itself."""
    outputs, inputs = convolution.kernel_shape[:2]
    return inputs == 1 and outputs == convolution.groups > 1


def _fit(tiles: Tiles, summed: str, itemsize: int, shared: int) -> Tiles:
    """Return tiles whose operands in flight fit in the memory: fewer stages, then shorter sums."""
    sides = {"positions": tiles.positions, "outputs": tiles.outputs, "inputs": tiles.inputs}
    length = sides.pop(summed)
    needed = length * sum(sides.values()) * itemsize
    while tiles.stages > 2 and tiles.stages * needed > shared:
        tiles = tiles._replace(stages=tiles.stages - 1)
    while length > 16 and tiles.stages * needed > shared:
        length, needed = length // 2, needed // 2
    return tiles._replace(**{summed: length})


@functools.lru_cache(maxsize=64)
def _shared(device: torch.device) -> int:
    """Return the bytes of shared memory of a program."""
    if device.type != "cuda":
        return SHARED
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED))


def start(
    kernel: str, programs: int, first: Tensor, *others: Any, module: ModuleType | None = None, **fixed: Any
) -> None:
    """Launch a kernel on the device of its tensors, which need not be the current one.

    Args:
        kernel: its name.
        programs: how many.
        first, others: its arguments, tensors and numbers.
        module: where it stands; `kernels` without.
        fixed: what it is compiled for.
    """
    found = getattr(module or kernels(), kernel)[(programs,)]
    if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
        found(first, *others, **fixed)
        return
    with torch.cuda.device(first.device):
        found(first, *others, **fixed)


def _launch(kernel: str, launch: Launch, first: Tensor, *others: Tensor) -> None:
    module = kernels() if "K" in launch.constants else _depthwise_kernels()
    start(kernel, len(first) * launch.programs, first, *others, *launch.numbers, module=module, **launch.constants)


@functools.lru_cache(maxsize=1024)
def _forward(
    convolution: Convolution, size: Shape, tiles: Tiles | None, itemsize: int, shared: int, precision: str
) -> Launch:
    walk, places = forward_walk(convolution, size), Weights.of(convolution)
    images = (_inputs(convolution), size), (convolution.kernel_shape[0], convolution.output_size(size))
    return _walk(walk, places, convolution, images, tiles, itemsize, shared, precision, turned=False)


@functools.lru_cache(maxsize=1024)
def _backward(
    convolution: Convolution, size: Shape, tiles: Tiles | None, itemsize: int, shared: int, precision: str
) -> list[Launch]:
    places = Weights.of(convolution)
    places = places._replace(outputs=places.inputs, inputs=places.outputs)
    images = (convolution.kernel_shape[0], convolution.output_size(size)), (_inputs(convolution), size)
    return [
        _walk(walk, places, convolution, images, tiles, itemsize, shared, precision, turned=True)
        for walk in backward_walks(convolution, size)
    ]


def _walk(
    walk: Walk,
    places: Weights,
    convolution: Convolution,
    images: tuple[tuple[int, Shape], tuple[int, Shape]],
    tiles: Tiles | None,
    itemsize: int,
    shared: int,
    precision: str,
    *,
    turned: bool,
) -> Launch:
    """Return the launch of `convolve` for one walk; `images` are (channels, size) of what is read and written."""
    rows, columns = walk
    (inputs, size), (outputs, output_size) = images
    positions = rows.positions * columns.positions
    depthwise = is_depthwise(convolution)
    cut = tiles or (
        depthwise_tiles(outputs) if depthwise else convolving_tiles(positions, outputs, inputs, itemsize, shared)
    )
    tap_row = places.tap * two_sides(convolution.kernel_shape[2:])[1]
    numbers = (
        *(*_channels(convolution, inputs, outputs), *two_sides(size), positions, columns.positions),
        *(rows.scale, columns.scale, rows.first, columns.first, rows.step, columns.step),
        *(rows.taps * columns.taps, max(columns.taps, 1)),
        *(rows.place, columns.place, rows.begin, columns.begin, two_sides(output_size)[1]),
        *(inputs * math.prod(size), places.sample, outputs * math.prod(output_size)),
        rows.kernel_first * tap_row + columns.kernel_first * places.tap,
        *(rows.kernel_step * tap_row, columns.kernel_step * places.tap),
        *(_depthwise(places) if depthwise else (*places.inputs, *places.outputs)),
    )
    programs = math.ceil(positions / cut.positions) * math.ceil(outputs / cut.outputs)
    constants = _constants(convolution, cut, inputs, outputs, places, precision)
    if depthwise:
        return Launch(programs, numbers, constants)
    return Launch(programs, numbers, {"TURNED": turned, "POINTWISE": is_pointwise(walk), **constants})


@functools.lru_cache(maxsize=1024)
def _correlation(
    convolution: Convolution, size: Shape, tiles: Tiles | None, itemsize: int, shared: int, precision: str
) -> Launch:
    outputs, inputs = convolution.kernel_shape[0], _inputs(convolution)
    places = Weights.of(convolution)
    rows, columns = forward_walk(convolution, size)
    positions, taps = rows.positions * columns.positions, rows.taps * columns.taps
    depthwise = is_depthwise(convolution)
    cut = tiles or (
        depthwise_tiles(outputs) if depthwise else correlating_tiles(positions, outputs, inputs, itemsize, shared)
    )
    numbers = (
        *(*_channels(convolution, inputs, outputs), *two_sides(size), positions, columns.positions),
        *(rows.scale, columns.scale, rows.first, columns.first, rows.step, columns.step, taps, columns.taps),
        *(inputs * math.prod(size), places.sample, outputs * positions),
        *(places.tap * columns.taps, places.tap),
        *(_depthwise(places) if depthwise else (*places.inputs, *places.outputs)),
    )
    constants = _constants(convolution, cut, inputs, outputs, places, precision)
    if depthwise:
        return Launch(taps * math.ceil(outputs / cut.outputs), numbers, constants)
    whole = positions <= cut.positions
    programs = (1 if whole else taps) * math.ceil(outputs / cut.outputs) * math.ceil(inputs / cut.inputs)
    return Launch(programs, numbers, {"WHOLE": whole, "POINTWISE": is_pointwise((rows, columns)), **constants})


def _inputs(convolution: Convolution) -> int:
    return convolution.kernel_shape[1] * convolution.groups


def _channels(convolution: Convolution, inputs: int, outputs: int) -> tuple[int, ...]:
    return (outputs,) if is_depthwise(convolution) else (inputs, outputs)


def _depthwise(places: Weights) -> tuple[int, int]:
    """Return what a channel adds to the place of a weight; of the one that has several, whichever way it is turned."""
    return max(places.outputs, places.inputs)


def _constants(
    convolution: Convolution, cut: Tiles, inputs: int, outputs: int, places: Weights, precision: str
) -> dict[str, Any]:
    common = {"M": cut.positions, "N": cut.outputs, "num_warps": cut.warps, "num_stages": cut.stages}
    if is_depthwise(convolution):
        return {"ALIGNED": math.gcd(16, outputs, _depthwise(places)[0]), **common}
    even = inputs % cut.inputs == 0 and outputs % cut.outputs == 0
    aligned = _aligned(inputs, outputs, places)
    return {"ALIGNED": aligned, "EVEN": even, "K": cut.inputs, "PRECISION": precision, **common}


def _aligned(inputs: int, outputs: int, places: Weights) -> int:
    return math.gcd(16, inputs, outputs, places.inputs[0], places.outputs[0])


def _precision() -> str:
    """Return how float32 is multiplied: as torch's own products are asked to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _power(number: int, least: int, most: int) -> int:
    """Return the next power of 2 from a number on, within bounds."""
    return min(max(1 << (number - 1).bit_length(), least), most)


@functools.cache
def kernels() -> ModuleType:
    """Return what is compiled when it is first launched."""
    return importlib.import_module("kw_lightning.nn.engine.tiles.kernels")


@functools.cache
def _depthwise_kernels() -> ModuleType:
    return importlib.import_module("kw_lightning.nn.engine.tiles.depthwise")
