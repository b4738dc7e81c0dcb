# ruff: noqa: N803 (constants of a compilation are written in capitals)
"""The kernels themselves. Imported where they are launched, so that Triton is needed nowhere else.

Both read images channels last, [batch, height, width, channels], and kernels as the mixing product leaves them: the
place of a number in a sample's kernel is a sum of what its kernel position, its output channel and its input channel
add; a channel adds (channel // cell) · what a group of them adds, and its place in the cell, where the input channels
of an output channel are a row. So no kernel is ever permuted. All sums are taken in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers for whose values no kernel is compiled anew: they say nothing of how memory is read.
READING = [
    *("height", "width", "positions", "columns", "scale_y", "scale_x", "first_y", "first_x", "step_y", "step_x"),
    *("taps", "taps_x"),
]
WRITING = ["place_y", "place_x", "begin_y", "begin_x", "width_y"]


@triton.jit(do_not_specialize=[*READING, *WRITING])  # type: ignore[untyped-decorator]
def convolve(  # type: ignore[no-untyped-def]
    x,
    weights,
    y,
    inputs,  # channels of x
    outputs,  # channels of y
    height,  # of x
    width,
    positions,  # that are computed, of all rows
    columns,  # of them, in a row
    scale_y,  # position p reads x at p · scale + first + tap · step
    scale_x,
    first_y,
    first_x,
    step_y,
    step_x,
    taps,  # of all rows
    taps_x,  # of a row
    place_y,  # position p is written to y at p · place + begin
    place_x,
    begin_y,
    begin_x,
    width_y,  # of y
    x_sample,  # numbers of a sample
    weights_sample,
    y_sample,
    tap_first,  # what a kernel position adds to the place of a weight
    tap_y,
    tap_x,
    in_cell,  # channels of x of a cell
    in_group,  # what a group of them adds
    out_cell,  # channels of y
    out_group,
    TURNED: tl.constexpr,  # x is the output's gradient, and y the input's
    ALIGNED: tl.constexpr,  # divides all counts of channels
    M: tl.constexpr,  # positions, output channels and input channels of a tile
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the convolution of positions with every sample's own kernel; one program computes one tile of a sample."""
    inputs = inputs // ALIGNED * ALIGNED
    outputs = outputs // ALIGNED * ALIGNED
    in_cell = in_cell // ALIGNED * ALIGNED
    out_cell = out_cell // ALIGNED * ALIGNED
    tiles_n = tl.cdiv(outputs, N)
    tiles = tl.cdiv(positions, M) * tiles_n
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // tiles_n) * M + tl.arange(0, M)
    n = (tile % tiles_n) * N + tl.arange(0, N)
    row = m // columns
    column = m - row * columns
    from_y = row * scale_y + first_y
    from_x = column * scale_x + first_x
    x += sample * x_sample
    weights += sample * weights_sample
    of_output = (n // out_cell) * out_group + (n % out_cell) * (1 if TURNED else in_cell)
    total = tl.zeros((M, N), dtype=tl.float32)
    blocks = tl.cdiv(inputs, K)
    for step in range(taps * blocks):
        tap = step // blocks
        k = (step - tap * blocks) * K + tl.arange(0, K)
        at_y = tap // taps_x
        at_x = tap - at_y * taps_x
        read_y = from_y + at_y * step_y
        read_x = from_x + at_x * step_x
        inside = (read_y >= 0) & (read_y < height) & (read_x >= 0) & (read_x < width) & (m < positions)
        image = tl.load(
            x + ((read_y * width + read_x) * inputs)[:, None] + k[None, :],
            mask=inside[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        of_input = (k // in_cell) * in_group + (k % in_cell) * (out_cell if TURNED else 1)
        of_tap = tap_first + at_y * tap_y + at_x * tap_x
        kernel = tl.load(
            weights + of_tap + of_input[:, None] + of_output[None, :],
            mask=(k < inputs)[:, None] & (n < outputs)[None, :],
            other=0.0,
        )
        total = tl.dot(image, kernel, total, input_precision=PRECISION)
    place = (row * place_y + begin_y) * width_y + column * place_x + begin_x
    tl.store(
        y + sample * y_sample + (place * outputs)[:, None] + n[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < positions)[:, None] & (n < outputs)[None, :],
    )


@triton.jit(do_not_specialize=READING)  # type: ignore[untyped-decorator]
def correlate(  # type: ignore[no-untyped-def]
    x,
    gradient,
    weights,
    inputs,
    outputs,
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
    in_cell,
    in_group,
    out_cell,
    out_group,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of every sample's own kernel; one program computes one tile of one kernel position.

    As in `convolve`, whose gradient it is: `gradient` lies as y does, all its positions computed.
    """
    inputs = inputs // ALIGNED * ALIGNED
    outputs = outputs // ALIGNED * ALIGNED
    in_cell = in_cell // ALIGNED * ALIGNED
    out_cell = out_cell // ALIGNED * ALIGNED
    tiles_k = tl.cdiv(inputs, K)
    tiles = tl.cdiv(outputs, N) * tiles_k
    tile = tl.program_id(0) % tiles
    tap = (tl.program_id(0) // tiles) % taps
    sample = (tl.program_id(0) // tiles // taps).to(tl.int64)
    n = (tile // tiles_k) * N + tl.arange(0, N)
    k = (tile % tiles_k) * K + tl.arange(0, K)
    at_y = tap // taps_x
    at_x = tap - at_y * taps_x
    x += sample * x_sample
    gradient += sample * gradient_sample
    total = tl.zeros((N, K), dtype=tl.float32)
    for step in range(tl.cdiv(positions, M)):
        m = step * M + tl.arange(0, M)
        row = m // columns
        column = m - row * columns
        read_y = row * scale_y + first_y + at_y * step_y
        read_x = column * scale_x + first_x + at_x * step_x
        inside = (read_y >= 0) & (read_y < height) & (read_x >= 0) & (read_x < width) & (m < positions)
        spread = tl.load(
            gradient + (m * outputs)[None, :] + n[:, None],
            mask=(m < positions)[None, :] & (n < outputs)[:, None],
            other=0.0,
        )
        image = tl.load(
            x + ((read_y * width + read_x) * inputs)[:, None] + k[None, :],
            mask=inside[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        total = tl.dot(spread, image, total, input_precision=PRECISION)
    of_output = (n // out_cell) * out_group + (n % out_cell) * in_cell
    of_input = (k // in_cell) * in_group + k % in_cell
    tl.store(
        weights + sample * weights_sample + at_y * tap_y + at_x * tap_x + of_output[:, None] + of_input[None, :],
        total.to(weights.dtype.element_ty),
        mask=(n < outputs)[:, None] & (k < inputs)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def weigh(z, initial, temperature, alpha, mixtures, cells, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write α [rows, cells] of z [rows, cells + 1]; one program takes one mixture of one sample."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    value = tl.load(z + row * (cells + 1) + column, mask=column <= cells, other=0.0)
    share = (1 - tl.load(temperature)) / (tl.sum(tl.abs(value), axis=0) + 0.001)
    begin = tl.load(initial + tl.program_id(0) % mixtures)
    found = value * share + tl.where(column == begin, tl.load(temperature), 0.0)
    tl.store(alpha + row * cells + column, found, mask=column < cells)


@triton.jit  # type: ignore[untyped-decorator]
def differentiate_weights(z, gradient, temperature, row_length, cells, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Put the gradient of z in its place, from that of α, whose rows begin every `row_length` numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    value = tl.load(z + row * (cells + 1) + column, mask=column <= cells, other=0.0)
    size = tl.sum(tl.abs(value), axis=0) + 0.001
    share = (1 - tl.load(temperature)) / size
    part = tl.load(gradient + row * row_length + column, mask=column < cells, other=0.0)
    of_size = -tl.sum(part * value, axis=0) * share / size
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    tl.store(z + row * (cells + 1) + column, sign * of_size + part * share, mask=column <= cells)
