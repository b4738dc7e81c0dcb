# ruff: noqa: N803 (constants of a compilation are written in capitals)
"""The kernels of depthwise convolutions: as `kernels`, but a channel of the output reads that of the input alone."""

from __future__ import annotations

import triton
import triton.language as tl

from kw_lightning.nn.engine.tiles.kernels import READING, WRITING


@triton.jit(do_not_specialize=[*READING, *WRITING])  # type: ignore[untyped-decorator]
def convolve(  # type: ignore[no-untyped-def]
    x,
    weights,
    y,
    channels,
    height,
    width,
    positions,
    columns,
    scale_y,
    scale_x,
    first_y,
    first_x,
    step_y,
    step_x,
    taps,
    taps_x,
    place_y,
    place_x,
    begin_y,
    begin_x,
    width_y,
    x_sample,
    weights_sample,
    y_sample,
    tap_first,
    tap_y,
    tap_x,
    cell,  # channels of a cell
    group,  # what a group of them adds to the place of a weight
    ALIGNED: tl.constexpr,
    M: tl.constexpr,  # positions and channels of a tile
    N: tl.constexpr,
):
    """Write the convolution of positions with every sample's own kernel; one program computes one tile of a sample."""
    channels = channels // ALIGNED * ALIGNED
    cell = cell // ALIGNED * ALIGNED
    tiles_n = tl.cdiv(channels, N)
    tiles = tl.cdiv(positions, M) * tiles_n
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // tiles_n) * M + tl.arange(0, M)
    n = (tile % tiles_n) * N + tl.arange(0, N)
    row = m // columns
    column = m - row * columns
    x += sample * x_sample
    weights += sample * weights_sample
    of_channel = (n // cell) * group + n % cell
    total = tl.zeros((M, N), dtype=tl.float32)
    for tap in range(taps):
        at_y = tap // taps_x
        at_x = tap - at_y * taps_x
        read_y = row * scale_y + first_y + at_y * step_y
        read_x = column * scale_x + first_x + at_x * step_x
        inside = (read_y >= 0) & (read_y < height) & (read_x >= 0) & (read_x < width) & (m < positions)
        image = tl.load(
            x + ((read_y * width + read_x) * channels)[:, None] + n[None, :],
            mask=inside[:, None] & (n < channels)[None, :],
            other=0.0,
        )
        kernel = tl.load(weights + tap_first + at_y * tap_y + at_x * tap_x + of_channel, mask=n < channels, other=0.0)
        total += image.to(tl.float32) * kernel.to(tl.float32)[None, :]
    place = (row * place_y + begin_y) * width_y + column * place_x + begin_x
    tl.store(
        y + sample * y_sample + (place * channels)[:, None] + n[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < positions)[:, None] & (n < channels)[None, :],
    )


@triton.jit(do_not_specialize=READING)  # type: ignore[untyped-decorator]
def correlate(  # type: ignore[no-untyped-def]
    x,
    gradient,
    weights,
    channels,
    height,
    width,
    positions,
    columns,
    scale_y,
    scale_x,
    first_y,
    first_x,
    step_y,
    step_x,
    taps,
    taps_x,
    x_sample,
    weights_sample,
    gradient_sample,
    tap_y,
    tap_x,
    cell,
    group,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Write the gradient of every sample's own kernel; one program sums for one kernel position of some channels."""
    channels = channels // ALIGNED * ALIGNED
    cell = cell // ALIGNED * ALIGNED
    tiles = tl.cdiv(channels, N)
    tap = (tl.program_id(0) // tiles) % taps
    sample = (tl.program_id(0) // tiles // taps).to(tl.int64)
    n = (tl.program_id(0) % tiles) * N + tl.arange(0, N)
    at_y = tap // taps_x
    at_x = tap - at_y * taps_x
    x += sample * x_sample
    gradient += sample * gradient_sample
    total = tl.zeros((M, N), dtype=tl.float32)
    for step in range(tl.cdiv(positions, M)):
        m = step * M + tl.arange(0, M)
        row = m // columns
        column = m - row * columns
        read_y = row * scale_y + first_y + at_y * step_y
        read_x = column * scale_x + first_x + at_x * step_x
        inside = (read_y >= 0) & (read_y < height) & (read_x >= 0) & (read_x < width) & (m < positions)
        known = inside[:, None] & (n < channels)[None, :]
        spread = tl.load(gradient + (m * channels)[:, None] + n[None, :], mask=known, other=0.0)
        image = tl.load(x + ((read_y * width + read_x) * channels)[:, None] + n[None, :], mask=known, other=0.0)
        total += spread.to(tl.float32) * image.to(tl.float32)
    of_channel = (n // cell) * group + n % cell
    tl.store(
        weights + sample * weights_sample + at_y * tap_y + at_x * tap_x + of_channel,
        tl.sum(total, axis=0).to(weights.dtype.element_ty),
        mask=n < channels,
    )
