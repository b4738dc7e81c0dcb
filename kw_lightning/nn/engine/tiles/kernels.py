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
# Where positions beyond the last one read, far outside of every map.
OUTSIDE = tl.constexpr(-(2**30))
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
    in_cell: tl.constexpr,  # channels of x of a cell
    in_group,  # what a group of them adds
    out_cell: tl.constexpr,  # channels of y
    out_group,
    TURNED: tl.constexpr,  # x is the output's gradient, and y the input's
    POINTWISE: tl.constexpr,  # position p reads p alone, and is written there
    ALIGNED: tl.constexpr,  # divides all counts of channels
    EVEN: tl.constexpr,  # tiles end where the channels do
    M: tl.constexpr,  # positions, output channels and input channels of a tile
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the convolution of positions with every sample's own kernel; one program computes one tile of a sample."""
    inputs = inputs // ALIGNED * ALIGNED
    outputs = outputs // ALIGNED * ALIGNED
    tiles_n = tl.cdiv(outputs, N)
    tiles = tl.cdiv(positions, M) * tiles_n
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // tiles_n) * M + tl.arange(0, M)
    n = (tile % tiles_n) * N + tl.arange(0, N)
    channel = tl.arange(0, K)
    known = m < positions
    place = m
    read = m
    if not POINTWISE:
        row = m // columns
        column = m - row * columns
        place = (row * place_y + begin_y) * width_y + column * place_x + begin_x
        from_y = row * scale_y + first_y
        from_x = column * scale_x + first_x
        read = from_y * width + from_x
        from_y = tl.where(known, from_y, OUTSIDE)
    images = x + sample * x_sample + (read * inputs)[:, None] + channel[None, :]
    of_output = (n // out_cell) * out_group + (n % out_cell) * (1 if TURNED else in_cell)
    in_step: tl.constexpr = out_cell if TURNED else 1
    kernels = weights + sample * weights_sample + tap_first + of_output[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    blocks = tl.cdiv(inputs, K)
    for step in range(blocks if POINTWISE else taps * blocks):
        begin = step * K
        shift = begin
        of_tap = 0
        inside = known
        if not POINTWISE:
            tap = step // blocks
            begin -= tap * blocks * K
            at_y = tap // taps_x
            at_x = tap - at_y * taps_x
            move_y = at_y * step_y
            move_x = at_x * step_x
            inside = is_inside(from_y + move_y, height) & is_inside(from_x + move_x, width)
            shift = begin + (move_y * width + move_x) * inputs
            of_tap = at_y * tap_y + at_x * tap_x
        if in_cell % K == 0:
            block = begin // in_cell
            of_block = block * in_group + (begin - block * in_cell) * in_step  # by %, Triton 3.6 copies 2 bytes at once
            places = kernels + (of_tap + of_block) + (channel * in_step)[:, None]
        else:
            k = begin + channel
            places = kernels + of_tap + ((k // in_cell) * in_group + (k % in_cell) * in_step)[:, None]
        if EVEN:
            image = tl.load(images + shift, mask=inside[:, None], other=0.0)
            kernel = tl.load(places)
        else:
            k = begin + channel
            image = tl.load(images + shift, mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
            kernel = tl.load(places, mask=(k < inputs)[:, None] & (n < outputs)[None, :], other=0.0)
        total = tl.dot(image, kernel, total, input_precision=PRECISION)
    tl.store(
        y + sample * y_sample + (place * outputs)[:, None] + n[None, :],
        total.to(y.dtype.element_ty),
        mask=known[:, None] & (n < outputs)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def is_inside(at, size):  # type: ignore[no-untyped-def]
    """Return where 0 ≤ at < size, by one comparison."""
    return at.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


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
    in_cell: tl.constexpr,
    in_group,
    out_cell: tl.constexpr,
    out_group,
    POINTWISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,  # a program takes all kernel positions; those of the map are one tile
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of every sample's own kernel; one program computes one tile, of one kernel position or of all.

    As in `convolve`, whose gradient it is: `gradient` lies as y does, all its positions computed.
    """
    inputs = inputs // ALIGNED * ALIGNED
    outputs = outputs // ALIGNED * ALIGNED
    tiles_k = tl.cdiv(inputs, K)
    tiles = tl.cdiv(outputs, N) * tiles_k
    tile = tl.program_id(0) % tiles
    first = 0 if WHOLE else (tl.program_id(0) // tiles) % taps
    sample = (tl.program_id(0) // tiles // (1 if WHOLE else taps)).to(tl.int64)
    n = (tile // tiles_k) * N + tl.arange(0, N)
    k = (tile % tiles_k) * K + tl.arange(0, K)
    images = x + sample * x_sample + k[None, :]
    gradients = gradient + sample * gradient_sample + n[:, None]
    of_output = (n // out_cell) * out_group + (n % out_cell) * in_cell
    of_input = (k // in_cell) * in_group + k % in_cell
    places = weights + sample * weights_sample + of_output[:, None] + of_input[None, :]
    known = (n < outputs)[:, None] & (k < inputs)[None, :]
    m = tl.arange(0, M)
    row = m // columns
    column = m - row * columns
    if WHOLE:  # the output's gradient is read once
        spread = tl.load(
            gradients + (m * outputs)[None, :],
            mask=(m < positions)[None, :] & (n < outputs)[:, None],
            other=0.0,
        )
        for tap in range(taps):
            at_y = tap // taps_x
            at_x = tap - at_y * taps_x
            read_y = row * scale_y + first_y + at_y * step_y
            read_x = column * scale_x + first_x + at_x * step_x
            inside = is_inside(read_y, height) & is_inside(read_x, width) & (m < positions)
            read = ((read_y * width + read_x) * inputs)[:, None]
            if EVEN:
                image = tl.load(images + read, mask=inside[:, None], other=0.0)
            else:
                image = tl.load(images + read, mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
            found = tl.dot(spread, image, input_precision=PRECISION).to(weights.dtype.element_ty)
            if EVEN:
                tl.store(places + at_y * tap_y + at_x * tap_x, found)
            else:
                tl.store(places + at_y * tap_y + at_x * tap_x, found, mask=known)
    else:
        at_y = first // taps_x
        at_x = first - at_y * taps_x
        from_y = first_y + at_y * step_y
        from_x = first_x + at_x * step_x
        rows = M // columns
        rest = M - rows * columns
        total = tl.zeros((N, K), dtype=tl.float32)
        for step in range(tl.cdiv(positions, M)):
            m = step * M + tl.arange(0, M)
            inside = m < positions
            read = m
            if not POINTWISE:
                read_y = row * scale_y + from_y
                read_x = column * scale_x + from_x
                inside = is_inside(read_y, height) & is_inside(read_x, width) & inside
                read = read_y * width + read_x
                column += rest  # the next tile's positions, without another division
                over = column >= columns
                row += rows + over.to(tl.int32)
                column = tl.where(over, column - columns, column)
            of_image = (read * inputs)[:, None]
            of_gradient = (m * outputs)[None, :]
            if EVEN:
                spread = tl.load(gradients + of_gradient, mask=(m < positions)[None, :], other=0.0)
                image = tl.load(images + of_image, mask=inside[:, None], other=0.0)
            else:
                both = (m < positions)[None, :] & (n < outputs)[:, None]
                spread = tl.load(gradients + of_gradient, mask=both, other=0.0)
                image = tl.load(images + of_image, mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
            total = tl.dot(spread, image, total, input_precision=PRECISION)
        tl.store(places + at_y * tap_y + at_x * tap_x, total.to(weights.dtype.element_ty), mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def weigh(z, bias, initial, temperature, alpha, length, mixtures, cells, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write α [rows, length], 0 after the cells, of z [rows, cells + 1]; a program takes one mixture of one sample."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    value = tl.load(z + row * (cells + 1) + column, mask=column <= cells, other=0.0)
    value += tl.load(bias + tl.program_id(0) % mixtures * (cells + 1) + column, mask=column <= cells, other=0.0)
    share = (1 - tl.load(temperature)) / (tl.sum(tl.abs(value), axis=0) + 0.001)
    begin = tl.load(initial + tl.program_id(0) % mixtures)
    found = value * share + tl.where(column == begin, tl.load(temperature), 0.0)
    found = tl.where(column < cells, found, 0.0)
    tl.store(alpha + row * length + column, found.to(alpha.dtype.element_ty), mask=column < length)


@triton.jit  # type: ignore[untyped-decorator]
def differentiate_weights(  # type: ignore[no-untyped-def]
    z,
    bias,
    gradient,
    temperature,
    row_length,
    mixtures,
    cells,
    COLUMNS: tl.constexpr,
):
    """Put the gradient of z in its place, from that of α, whose rows begin every `row_length` numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    value = tl.load(z + row * (cells + 1) + column, mask=column <= cells, other=0.0)
    value += tl.load(bias + tl.program_id(0) % mixtures * (cells + 1) + column, mask=column <= cells, other=0.0)
    size = tl.sum(tl.abs(value), axis=0) + 0.001
    share = (1 - tl.load(temperature)) / size
    part = tl.load(gradient + row * row_length + column, mask=column < cells, other=0.0)
    of_size = -tl.sum(part * value, axis=0) * share / size
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    tl.store(z + row * (cells + 1) + column, sign * of_size + part * share, mask=column <= cells)


@triton.jit  # type: ignore[untyped-decorator]
def normalise(  # type: ignore[no-untyped-def]
    raw,
    scale,
    shift,
    mean,
    variance,
    running_mean,
    running_variance,
    hidden,
    batch,
    width,
    epsilon,
    momentum,
    unbiased,  # batch / (batch - 1)
    GIVEN: tl.constexpr,  # mean and variance are read, else written
    RUNNING: tl.constexpr,  # the running ones take note of the batch
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ReLU of the batch norm of raw [batch, width]; one program takes some columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < width
    if GIVEN:
        center = tl.load(mean + column, mask=known, other=0.0)
        spread = tl.load(variance + column, mask=known, other=0.0)
    else:
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for step in range(tl.cdiv(batch, ROWS)):
            row = step * ROWS + tl.arange(0, ROWS)
            inside = (row < batch)[:, None] & known[None, :]
            total += tl.sum(tl.load(raw + row[:, None] * width + column[None, :], mask=inside, other=0.0), axis=0)
        center = total / batch
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for step in range(tl.cdiv(batch, ROWS)):
            row = step * ROWS + tl.arange(0, ROWS)
            inside = (row < batch)[:, None] & known[None, :]
            value = tl.load(raw + row[:, None] * width + column[None, :], mask=inside, other=0.0) - center[None, :]
            total += tl.sum(tl.where(inside, value * value, 0.0), axis=0)
        spread = total / batch
        tl.store(mean + column, center, mask=known)
        tl.store(variance + column, spread, mask=known)
    if RUNNING:
        before = tl.load(running_mean + column, mask=known, other=0.0)
        tl.store(running_mean + column, before + momentum * (center - before), mask=known)
        before = tl.load(running_variance + column, mask=known, other=0.0)
        tl.store(running_variance + column, before + momentum * (spread * unbiased - before), mask=known)
    factor = tl.load(scale + column, mask=known, other=0.0) * tl.rsqrt(spread + epsilon)
    begin = tl.load(shift + column, mask=known, other=0.0)
    for step in range(tl.cdiv(batch, ROWS)):
        row = step * ROWS + tl.arange(0, ROWS)
        inside = (row < batch)[:, None] & known[None, :]
        place = row[:, None] * width + column[None, :]
        value = (tl.load(raw + place, mask=inside, other=0.0) - center[None, :]) * factor[None, :] + begin[None, :]
        tl.store(hidden + place, tl.where(value < 0, 0.0, value), mask=inside)  # what is no number stays none


@triton.jit  # type: ignore[untyped-decorator]
def differentiate_norm(  # type: ignore[no-untyped-def]
    gradient,
    raw,
    hidden,
    scale,
    mean,
    variance,
    of_raw,
    of_scale,
    of_shift,
    batch,
    width,
    epsilon,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients of raw [batch, width], scale and shift from that of `normalise`'s result."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < width
    center = tl.load(mean + column, mask=known, other=0.0)
    share = tl.rsqrt(tl.load(variance + column, mask=known, other=0.0) + epsilon)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    scaled = tl.zeros((COLUMNS,), dtype=tl.float32)
    for step in range(tl.cdiv(batch, ROWS)):
        row = step * ROWS + tl.arange(0, ROWS)
        inside = (row < batch)[:, None] & known[None, :]
        place = row[:, None] * width + column[None, :]
        active = tl.load(hidden + place, mask=inside, other=0.0) > 0
        part = tl.where(active, tl.load(gradient + place, mask=inside, other=0.0), 0.0)
        value = (tl.load(raw + place, mask=inside, other=0.0) - center[None, :]) * share[None, :]
        total += tl.sum(part, axis=0)
        scaled += tl.sum(part * value, axis=0)
    tl.store(of_shift + column, total, mask=known)
    tl.store(of_scale + column, scaled, mask=known)
    factor = tl.load(scale + column, mask=known, other=0.0) * share
    for step in range(tl.cdiv(batch, ROWS)):
        row = step * ROWS + tl.arange(0, ROWS)
        inside = (row < batch)[:, None] & known[None, :]
        place = row[:, None] * width + column[None, :]
        active = tl.load(hidden + place, mask=inside, other=0.0) > 0
        part = tl.where(active, tl.load(gradient + place, mask=inside, other=0.0), 0.0)
        if not GIVEN:
            value = (tl.load(raw + place, mask=inside, other=0.0) - center[None, :]) * share[None, :]
            part -= (total[None, :] + value * scaled[None, :]) / batch
        tl.store(of_raw + place, part * factor[None, :], mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def add_to_positions(  # type: ignore[no-untyped-def]
    x,
    gradient,
    means,
    y,
    size,
    channels,
    programs,  # of a sample
    share,
    limit,
    BLOCK: tl.constexpr,
):
    """Write x [batch, size] plus share · gradient [batch, channels], channel by channel at every position.

    Where a mean is as large as the limit, nothing is added.
    """
    sample = (tl.program_id(0) // programs).to(tl.int64)
    place = (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(x + sample * size + place, mask=inside, other=0.0).to(tl.float32)
    channel = sample * channels + place % channels
    added = tl.load(gradient + channel, mask=inside, other=0.0) * share
    added = tl.where(tl.abs(tl.load(means + channel, mask=inside, other=0.0)) < limit, added, 0.0)
    tl.store(y + sample * size + place, (value + added).to(y.dtype.element_ty), mask=inside)
