"""How the work of the compiled passes is cut: what the bounds hold, and what threads share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kw_lightning.nn.engine.native import blocking
from kw_lightning.nn.engine.native.blocking import (
    BLOCK_BYTES,
    Blocking,
    Extents,
    block_bases,
    block_channels,
    block_inputs,
    block_kernels,
)

# ResNet18's third stage: 256 to 256 channels, 3×3, on 14×14, budget 1.
STAGE = Extents(16, 9, 47, 256, 256, 1, 1, 196, 196, 2, 16, 6 * 2**20, taps=9)


@st.composite
def extents(draw: st.DrawFn) -> Extents:
    def number(most: int) -> int:
        return draw(st.integers(1, most))

    sizes = [number(most) for most in (70, 30, 200, 600, 600, 4, 4, 3000, 3000, 9)]
    return Extents(*sizes, draw(st.sampled_from([16, 32])), draw(st.sampled_from([1, 2**16, 6 * 2**20])))


@given(extents(), st.sampled_from([block_kernels, block_inputs, block_channels]), st.booleans())
def test_every_size_is_within_what_there_is(e: Extents, block: object, backward: bool) -> None:
    found: Blocking = block(e, backward=backward)
    assert 1 <= found.depths <= e.depths
    assert 1 <= found.mixed <= e.batch
    assert 1 <= found.parts <= found.read <= e.batch
    assert found.parts <= e.threads


@given(extents(), st.booleans())
def test_blocks_and_kernels_keep_within_their_bounds_or_are_the_least(e: Extents, backward: bool) -> None:
    found, wide = block_kernels(e, backward=backward), e.width // 16
    block = 4 * e.cells * found.depths * e.width * (2 if backward else 1)
    step = blocking.LEAST_DEPTHS if backward else blocking.LINE
    # Pieces are evened out and rounded up to whole steps.
    assert (
        found.direct or block <= blocking.BLOCK_BYTES * wide + 4 * e.cells * step * e.width * 2 or found.depths <= step
    )
    kernels = 4 * e.rows * (found.depths + 1) * e.width * found.mixed
    bytes = blocking.GATHERED_BYTES if found.gathers else blocking.KERNEL_BYTES
    assert kernels <= min(bytes * wide, e.limit // e.threads) or (found.mixed == 1 and not found.gathers)
    assert not found.gathers or found.mixed * found.parts >= found.read


@given(extents(), st.sampled_from([block_kernels, block_inputs]), st.booleans())
def test_maps_keep_within_their_bound_or_are_one_for_each_part(e: Extents, block: object, backward: bool) -> None:
    found: Blocking = block(e, backward=backward)
    maps = 4 * e.source_positions * e.depths * e.depth_groups * found.read
    most = blocking.MOST_MAPS * blocking.MAP_BYTES
    assert maps <= most * found.read / max(found.read - found.parts, 1) or found.read <= 2 * found.parts


@given(extents())
def test_threads_have_like_shares(e: Extents) -> None:
    parts = block_kernels(e, backward=False).parts
    items = -(-e.lanes // e.width) * parts
    busiest = -(-items // e.threads)
    assert busiest * e.threads / items <= blocking.IMBALANCE or parts == e.batch


def test_a_layer_of_resnet18_is_cut_as_the_formulas_say() -> None:
    # Forward: 160 KiB hold 54 depths of 47 cells by 16 lanes, 48 in whole lines; 192 KiB hold 6 samples of 9 kernels.
    assert block_kernels(STAGE, backward=False) == Blocking(48, 6, 16, 1)
    # Backwards half of it, 27 depths, evened out to 32; 10 samples.
    assert block_kernels(STAGE, backward=True) == Blocking(32, 10, 16, 1)
    # All 256 lanes of a depthwise one, half of them for each thread; backwards a third of 160 KiB hold 64 of 188 cells.
    channels = STAGE._replace(depths=1)
    assert block_channels(channels, backward=False) == Blocking(1, 16, 16, 1, lines=128)
    assert block_channels(channels._replace(cells=188), backward=True) == Blocking(1, 16, 16, 1, lines=64)
    # Three blocks do not go evenly among two threads: those share strips, be they of one sample, **or** else blocks.
    uneven = channels._replace(lanes=48, batch=1)
    assert block_channels(uneven._replace(strips=8), backward=False) == Blocking(1, 1, 1, 2, lines=48)
    assert block_channels(uneven, backward=False) == Blocking(1, 1, 1, 1, lines=32)
    assert block_channels(uneven._replace(lanes=16, strips=3, threads=4), backward=False).parts == 3
    # Wider vectors come with larger caches.
    assert block_kernels(STAGE._replace(width=32), backward=False).depths == 48
    # Of mixed inputs a whole cell: 192 KiB hold less than one sample of 196 positions by 256 + 16 numbers, and 3.
    assert block_inputs(STAGE, backward=True) == Blocking(256, 1, 16, 1)
    assert block_inputs(STAGE._replace(source_positions=49), backward=True) == Blocking(256, 3, 16, 1)


def test_kernels_of_all_blocks_are_mixed_before_they_are_used_where_outputs_are_more() -> None:
    # Five times 784 outputs are more than 9 kernels of 256 depths, but not 8 times as many, as it takes backwards.
    large = STAGE._replace(source_positions=784, out_positions=784)
    assert block_kernels(large, backward=False) == Blocking(48, 4, 4, 1, tile=16, gathers=True)
    assert not block_kernels(large, backward=True).gathers
    assert block_kernels(large._replace(cells=224, depths=64), backward=True).gathers
    # Kept bases are brought from the memory again for few samples sooner than they are mixed again.
    bases = large._replace(batch=64, cells=188, ranks=17)
    assert block_bases(bases._replace(kept=True), backward=False).read < block_bases(bases, backward=False).read == 16


def test_few_kernels_are_mixed_of_cells_as_they_lie() -> None:
    # Of one sample all depths; a tile of 9 taps by 16 lanes takes 16 depths of what 16 KiB hold.
    one = STAGE._replace(batch=1)
    assert block_kernels(one, backward=False) == Blocking(256, 1, 1, 1, direct=True, tile=16)
    assert block_kernels(one._replace(taps=1, depth_groups=2), backward=False).tile == 128
    # 192 KiB hold 67 depths of 36 kernels by 20 lanes, 64 in whole tiles.
    assert block_kernels(one._replace(rows=36, cells=188), backward=False).depths == 64
    # Not where lanes or depths fill no squares, of many kernels of few cells, or backwards.
    others = (one._replace(lanes=255), one._replace(depths=6), one._replace(cells=44), one._replace(batch=2))
    assert not any(block_kernels(e, backward=False).direct for e in others)
    assert not block_kernels(one, backward=True).direct


@pytest.mark.parametrize(("lanes", "threads", "parts"), [(256, 2, 1), (24, 4, 2), (16, 4, 4), (48, 2, 2), (16, 64, 16)])
def test_samples_are_cut_where_there_are_fewer_blocks_of_lanes_than_threads(
    lanes: int, threads: int, parts: int
) -> None:
    assert blocking.share(STAGE._replace(lanes=lanes, threads=threads)) == parts


def test_bases_of_all_mixtures_share_a_block() -> None:
    bases = STAGE._replace(cells=188, ranks=17)
    found = block_bases(bases, backward=False)
    assert found.depths == 16 == BLOCK_BYTES // (4 * 9 * 17 * 16)
    assert block_bases(bases, backward=True) == Blocking(16, found.mixed, 16, 1)
    assert block_bases(bases._replace(rows=36, ranks=65), backward=False).depths == 4
