/* The arguments of a pass, and how passes read and write maps and cells. */

#ifndef KW_PASS_H
#define KW_PASS_H

#include "epilogue.h"
#include "tiles.h"
#include "winograd.h"

/* The positions of a line of `out` that read through the same taps of a kernel's line: `first`, `first` + `step`, ...,
   as many as `positions`, through taps `tap`, `tap` + `tap_step`, ..., as many as `taps`. The i-th of these positions
   reads through the k-th of these taps position `read` + i `read_step` + k `tap_read` of a line of the source with its
   zeros. */
typedef struct {
    int32_t first, step, positions, taps, tap, tap_step, read, read_step, tap_read;
} Phase;

/* How the lines of one map, `out`, read those of another, `source`, in a depthwise convolution: see native/walks.py.
   Lines are along the last dimension. */
typedef struct {
    index_t out, source;  /* positions of a line of each map */
    index_t lines;        /* lines of out */
    index_t before, room; /* zeros before a line of the source; its positions, with all zeros around them */
    index_t strip, held;  /* lines of out that are computed together; the most lines of the source that these read */
    index_t taps;         /* taps of a line of the kernel */
    index_t phases;
    const int32_t *reads; /* [lines of the kernel, lines of out]: the line of the source that is read, -1 for none */
    const int32_t *range; /* for each strip: the first line of the source that it reads, and how many */
    const Phase *phase;
} Walk;

/* The arguments of a pass. native/layout.py declares the same fields, and both are compared by `kw_layout` when the
   library is opened.

   All passes have the same loops, from outside to inside; native/blocking.py chooses their sizes:

       read_samples of the batch: their source is laid out for all threads                 (read_source)
           parts of these samples, times blocks of lanes of one group of a cell:
           shared among the threads                                                        (share_out)
               kernel_depths of the depths, mixed_samples: the kernels that exist at once
                   block_depths: a block of all cells is packed, and kernels are mixed     (pack_cells)
                   the kernels are applied, or their gradient is made:
                   groups, lane groups, tiles of positions, taps, depth groups, depths

   Sizes and steps are in "numbers", floats of 4 bytes. In mix_inputs.c a sample's mixed inputs take the place of its
   kernels. */
typedef struct {
    /* How much there is. */
    index_t batch; /* samples */
    index_t rows;  /* mixtures of a sample: row_tap for each kernel position that reads anything */
    index_t cells; /* n */

    /* A grouped convolution has groups * cell_groups groups, of which a cell spans cell_groups. Both are 1 where there
       are no groups, and in depthwise convolutions, whose groups are the lanes. */
    index_t groups, cell_groups;

    /* The channel axes of a cell within one group. Lanes and depths are output and input channels forward, input and
       output channels for the gradient of the input. A depthwise cell has its channels as lanes, and one depth. */
    index_t lanes;        /* of a cell, along the axis that fills the vectors */
    index_t depths;       /* of a cell, along the other axis */
    index_t lane_groups;  /* cells side by side along the lanes of a group's kernel */
    index_t depth_groups; /* and along its depths */

    /* Mixture (tap t, group q, lane group g, depth group h) is row t row_tap + q row_group + g row_lane + h row_depth
       of alpha. */
    index_t row_tap, row_group, row_lane, row_depth;

    /* Steps in E, in numbers, to the next cell, group within a cell, lane and depth. */
    index_t cell_step, group_step, lane_step, depth_step;

    /* Positions of a channel as the pass computes with them: in Winograd's form, transformed ones. */
    index_t out_positions, source_positions;

    Map out;    /* written: the output, or the gradient of the input */
    Map source; /* read: the input, or the gradient of the output */
    Map other;  /* backwards: the input, which the gradient of the kernels reads beside the source */

    Epilogue epilogue; /* of out, in the forward pass */

    /* In Winograd's form: the windows of these maps whose transformed positions those are. Otherwise without
       dimensions. */
    Windows out_windows, source_windows, other_windows;

    /* Which position reads which: see native/positions.py. */
    index_t taps;              /* kernel positions that read anything; in Winograd's form, transformed ones */
    index_t tiles;             /* entries of tile_start */
    index_t spans;             /* entries of span */
    const int32_t *tile_start; /* where each tile begins in `tile` */
    const int32_t *tile;       /* each: count, taps, [count] positions, then for each tap: t, [count] reads, -1: none */
    const int32_t *reads;      /* [taps, output positions of the convolution]: what each reads, -1 for none */
    const int32_t *span;       /* for the kernels' gradient, each: t, whether to add, first run, last run + 1 */
    const int32_t *run;        /* each: position of source, position of other, its step, how many */

    /* For a depthwise convolution, instead of all these but `taps`. */
    Walk walk;        /* how out reads source */
    Walk kernel_walk; /* backwards, for the kernels' gradient: how positions of source read other */

    /* Blocking: see the loops above. */
    index_t vectors;       /* of lanes in a block: 2, or 1 if that is enough for a cell's lanes */
    index_t direct;        /* whether kernels are mixed from cells as they lie, not packed: mix_kernels.c */
    index_t block_depths;  /* depths of a block of cells; if direct, of the kernels; in runs.h numbers of a run */
    index_t kernel_depths; /* in mix_kernels.c, depths of the kernels that exist at once: a block's, or all */
    index_t tile_depths;   /* depths that a tile takes at a time; the source is laid out in slices of so many */
    index_t mixed_samples; /* samples whose kernels exist at once in a thread, kernel_depths of them */
    index_t lines;        /* in mix_lines.c, mix_rows.c, mix_depthwise.c: lines of a cell whose kernels exist at once */
    index_t read_samples; /* samples whose maps are read together, for all threads */
    index_t parts;        /* into which the samples are cut if there are fewer blocks of lanes than threads */
    index_t threads;

    /* Along the attention's rank, a mixture is made of its own bases, and these of the cells: mix_kernels.c. */
    index_t ranks;       /* bases of a mixture; 0 if it is made of the cells, as in all other passes */
    index_t kept_filled; /* whether `kept` holds the bases already */
    const float *base;   /* bases by cells, [rows, ranks, cells] */
    float *kept;         /* the bases, block by block, kept from pass to pass; NULL if not to be kept */

    const float *alpha; /* [batch, rows, terms], the terms being ranks or cells */
    const float *cell;  /* E, by the steps above */
    /* Added to, for each thread: the gradient of alpha, [batch, rows, padded terms], then that of base, [rows, ranks,
       padded cells]. NULL if not wanted. */
    float *alpha_gradient;
    float *cell_gradient; /* [parts, cells, ...], by the steps of E; NULL if not wanted */
    index_t adds;         /* whether cell_gradient is added to; if parts > 1 it always is */
    float *memory;        /* as many numbers as the pass's `_memory` function returns */
} Pass;

/* Lanes of a block. */
static inline index_t block_lanes(const Pass *p) { return p->vectors * WIDTH; }

/* How many terms a mixture is the sum of. */
static inline index_t terms(const Pass *p) { return p->ranks ? p->ranks : p->cells; }

static inline index_t bases(const Pass *p) { return p->rows * p->ranks; }

/* The groups of a convolution, and channels of its source in each. */
static inline index_t all_groups(const Pass *p) { return p->groups * p->cell_groups; }

static inline index_t group_depths(const Pass *p) { return p->depths * p->depth_groups; }

/* Read some channels of one sample as [positions, width], zero beyond these channels; in Winograd's form, their
   transformed positions, by way of `mapped`. */
static inline void read_map(const Map *map, const Windows *windows, index_t sample, index_t channel, index_t channels,
                            index_t width, float *mapped, float *to) {
    float *raw = windows->dimensions ? mapped : to;
    if (channels < width) memset(raw, 0, map->positions * width * sizeof(float));
    arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel, raw, width,
            map->positions, channels);
    if (windows->dimensions) read_windows(windows, raw, width, to);
}

/* Write rows of a block's lanes, [positions, lanes], into some channels of one sample. */
static inline void write_map(const Pass *p, index_t sample, index_t channel, index_t channels, float *mapped,
                             const float *from) {
    if (p->out_windows.dimensions) write_windows(&p->out_windows, from, block_lanes(p), mapped), from = mapped;
    write_rows(&p->out, &p->epilogue, sample, channel, channels, block_lanes(p), 0, p->out.positions, from);
}

/* How many cells ahead of the one in use are prefetched. */
#define AHEAD 3

/* block[d * depth_step + j * cell_step + l] = E[j][depth + d][lane + l], of one group of a cell. */
static inline void pack_cells(const Pass *p, index_t group, index_t lane, index_t lanes, index_t depth, index_t depths,
                              float *block, index_t cell_step, index_t depth_step) {
    int turned = p->depth_step == 1;
    index_t lines = turned ? lanes : depths, line = turned ? depths : lanes;
    if (lanes < block_lanes(p)) memset(block, 0, depths * p->cells * block_lanes(p) * sizeof(float));
    for (index_t j = 0; j < p->cells; j++) {
        const float *cell =
            p->cell + j * p->cell_step + group * p->group_step + lane * p->lane_step + depth * p->depth_step;
        /* A cell's lines are short and far apart: the hardware does not prefetch the next cells'. */
        for (index_t i = 0; j + AHEAD < p->cells && i < lines; i++)
            fetch(cell + AHEAD * p->cell_step + i * (turned ? p->lane_step : p->depth_step), line);
        arrange(cell, p->depth_step, p->lane_step, block + j * cell_step, depth_step, depths, lanes);
    }
}

/* turned[panel of LANES cells][d, l][cell] = block[d][j][l], the right side of the product for alpha's gradient. */
static inline void turn_cells(const Pass *p, index_t depths, const float *block, float *turned) {
    index_t lanes = block_lanes(p);
    for (index_t j = 0; j < p->cells; j += LANES) {
        index_t count = smaller(LANES, p->cells - j);
        float *panel = turned + j * depths * lanes;
        if (count < LANES) memset(panel, 0, depths * lanes * LANES * sizeof(float));
        for (index_t d = 0; d < depths; d++)
            arrange(block + (d * p->cells + j) * lanes, 1, lanes, panel + d * lanes * LANES, LANES, lanes, count);
    }
}

/* Write a block of E's gradient, laid out as by pack_cells, or add it. Backwards, a cell's lanes are contiguous. */
static inline void unpack_cells(const Pass *p, index_t group, index_t lane, index_t lanes, index_t depth,
                                index_t depths, const float *block, index_t cell_step, index_t depth_step, float *to,
                                int add) {
    for (index_t j = 0; j < p->cells; j++)
        for (index_t d = 0; d < depths; d++) {
            float *line = to + j * p->cell_step + group * p->group_step + (depth + d) * p->depth_step + lane;
            const float *from = block + j * cell_step + d * depth_step;
            for (index_t k = 0; j + AHEAD < p->cells && k < lanes; k += 16)
                __builtin_prefetch(line + AHEAD * p->cell_step + k, 1);
            index_t whole = lanes / WIDTH * WIDTH;
            for (index_t l = 0; l < whole; l += WIDTH) {
                vector sum = LOAD(from + l);
                if (add) sum += LOAD(line + l);
                STORE(line + l, sum);
            }
            for (index_t l = whole; l < lanes; l++) line[l] = add ? line[l] + from[l] : from[l];
        }
}

INLINE index_t sample_size(const Pass *p) { return p->source_positions * group_depths(p) * all_groups(p); }

/* Lay out the source of some samples, from `first` on, as [sample, group, depth group, slice of tile_depths, position,
   depth]. */
static inline void read_source(const Pass *p, index_t first, index_t samples, float *to, float *scratch,
                               index_t scratch_step) {
    index_t chunks = pieces(p->depths, p->tile_depths), runs = all_groups(p) * p->depth_groups;
    index_t count = samples * runs * chunks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = count * thread / p->threads; i < count * (thread + 1) / p->threads; i++) {
            index_t depth = i % chunks * p->tile_depths, depths = smaller(p->tile_depths, p->depths - depth);
            index_t channel = i / chunks % runs * p->depths + depth, b = i / chunks / runs;
            read_map(&p->source, &p->source_windows, first + b, channel, depths, depths,
                     scratch + thread * scratch_step, to + b * sample_size(p) + channel * p->source_positions);
        }
}

/* What a thread does for a block's lanes of one group of a cell, for samples `first` to `last`; `memory` is its own. */
typedef void Work(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                  float *memory, float *alpha_gradient, float *cell_gradient, int add);

/* Do the work for all lanes and samples: a thread takes neighbouring blocks of lanes, or parts of their samples. If
   `shared`, the source is first laid out for all threads, since all lanes read all of it. */
static inline void share_out(const Pass *p, index_t memory, int shared, Work *work) {
    index_t blocks = pieces(p->lanes, block_lanes(p)), items = p->cell_groups * blocks * p->parts;
    index_t gradients = p->batch * p->rows * padded(terms(p)) + bases(p) * padded(p->cells);
    float *source = p->memory, *own = source + (shared ? p->read_samples * sample_size(p) : 0);
    for (index_t first = 0; first < p->batch; first += p->read_samples) {
        index_t samples = smaller(p->read_samples, p->batch - first);
        if (shared) read_source(p, first, samples, source, own, memory);
#pragma omp parallel for schedule(static) num_threads(p->threads)
        for (index_t thread = 0; thread < p->threads; thread++)
            for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
                index_t part = i % p->parts, from = samples * part / p->parts, to = samples * (part + 1) / p->parts;
                index_t group = i / p->parts / blocks, lane = i / p->parts % blocks * block_lanes(p);
                if (from == to) continue;
                work(p, group, lane, first + from, first + to, source + from * sample_size(p), own + thread * memory,
                     p->alpha_gradient ? p->alpha_gradient + thread * gradients : NULL,
                     p->cell_gradient ? p->cell_gradient + part * p->cells * p->cell_step : NULL,
                     first > 0 || p->parts > 1 || p->adds);
            }
    }
}

#endif
