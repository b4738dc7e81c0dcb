/* What a pass is told, and how it reads and writes maps and cells. */

#ifndef KW_PASS_H
#define KW_PASS_H

#include "epilogue.h"
#include "tiles.h"
#include "winograd.h"

/* Positions of a line, of which every so many-th is of the phase: `first`, `first` + `step`, ... They read as many
   taps of a kernel's line, `tap`, `tap` + `tap_step`, ..., the first position from position `read` of a line of the
   source and the zeros around it, the next from `read_step` further, and each tap `tap_read` further than the last. */
typedef struct {
    int32_t first, step, positions, taps, tap, tap_step, read, read_step, tap_read;
} Phase;

/* How a depthwise convolution goes from the lines of one map, along its last dimension, to those of another: see
   native/walks.py. */
typedef struct {
    index_t out, source;  /* positions of a line */
    index_t lines;        /* of out */
    index_t before, room; /* zeros before a line of the source; positions with all zeros around them */
    index_t strip, held;  /* lines of out that are computed together; the most lines of the source that those read */
    index_t taps;         /* of a line of the kernel */
    index_t phases;
    const int32_t *reads; /* [lines of the kernel, lines of out]: the line of the source that is read, -1 for none */
    const int32_t *range; /* of each strip: the first line of the source that it reads, and how many */
    const Phase *phase;
} Walk;

/* What a pass is told. native/layout.py declares the same and is compared with `kw_layout` when the library is opened.

   All passes go through the same loops; what is blocked by what is decided in native/blocking.py:

       read_samples of the batch: the source's maps of these are read, depths together     (read_source)
           parts of those samples, times blocks of LANES lanes of one group of a cell:
           shared among the threads                                                        (share_out)
               kernel_depths of the depths, mixed_samples: this part of their kernels
                   block_depths: this block of all cells is packed, and mixed                  (pack_cells)
                   used: groups, lane groups, tiles of positions, taps, depth groups, depths

   A "number" is 4 bytes. In mix_inputs.c a sample's mixed inputs stand where its kernels do elsewhere. */
typedef struct {
    /* How much there is. */
    index_t batch; /* samples */
    index_t rows;  /* mixtures of a sample: kernel positions that read anything times row_tap */
    index_t cells; /* n */

    /* A grouped convolution is many small ones side by side, of which a cell spans cell_groups; groups times that are
       all of them. Both are 1 where there are no groups, and of depthwise convolutions, whose lanes are their groups.
     */
    index_t groups, cell_groups;

    /* The channel axes of a cell in one group: output and input channels forward, input and output channels for the
       gradient of the input; of a depthwise convolution its channels, and 1. */
    index_t lanes;        /* of a cell, along the axis that lies along the vectors */
    index_t depths;       /* of a cell, along the other */
    index_t lane_groups;  /* cells side by side along the axis of lanes of a group's kernel */
    index_t depth_groups; /* and of depths */

    /* Mixture (tap t, group q, lane group g, depth group h) is row t row_tap + q row_group + g row_lane + h row_depth
       of alpha. */
    index_t row_tap, row_group, row_lane, row_depth;

    /* Steps in E from one cell, group in it, lane or depth to the next, in numbers. */
    index_t cell_step, group_step, lane_step, depth_step;

    /* Positions between which the pass computes: in Winograd's form transformed ones. */
    index_t out_positions, source_positions;

    Map out;    /* written: the output, or the gradient of the input */
    Map source; /* read: the input, or the gradient of the output */
    Map other;  /* read backwards: the input, which the gradient of the kernels takes beside the source */

    Epilogue epilogue; /* of out, in the forward pass */

    /* How those positions come of the maps' own, of the same maps; of Winograd's form alone. */
    Windows out_windows, source_windows, other_windows;

    /* Which position reads which: see native/positions.py. */
    index_t taps;              /* kernel positions that read anything; in Winograd's form transformed ones */
    index_t tiles;             /* entries of tile_start */
    index_t spans;             /* entries of span */
    const int32_t *tile_start; /* where each tile begins in `tile` */
    const int32_t *tile;       /* a tile: count, taps, [count] positions, then for each tap: t, [count] reads */
    const int32_t *reads;      /* [taps, output positions of the convolution]: what each reads, -1 for none */
    const int32_t *span;       /* of the kernels' gradient, each: t, whether it adds, runs from, to */
    const int32_t *run;        /* each: source, other, step of other, length */

    /* Of a depthwise convolution in place of those but for `taps`. */
    Walk walk;        /* from source to out */
    Walk kernel_walk; /* forward, from other to source: backwards, for the gradient of the kernels */

    /* Blocking: see the loops above. */
    index_t vectors;       /* of a block's lanes: 2, or 1 where cells have no more lanes than that */
    index_t direct;        /* whether few kernels are mixed of the cells as they lie: mix_kernels.c */
    index_t block_depths;  /* depths of a block of cells, or, of direct kernels, of the kernels */
    index_t kernel_depths; /* depths of the kernels that exist at once, of mix_kernels.c: a block's, or all */
    index_t tile_depths;   /* depths that tiles take at a time, and by which the source is laid out */
    index_t mixed_samples; /* samples whose kernels, of those depths, exist at once in a thread */
    index_t lines;         /* of a cell, whose kernels exist at once: of mix_lines.c, mix_rows.c, mix_depthwise.c */
    index_t read_samples;  /* samples whose maps are read together, for all threads */
    index_t parts;         /* into which the samples are cut where there are fewer blocks of lanes than threads */
    index_t threads;

    /* Along the attention's rank a mixture is of bases of its own, which are mixtures of the cells: mix_kernels.c. */
    index_t ranks;       /* bases of a mixture; 0 where it is of the cells, as in all other passes */
    index_t kept_filled; /* whether `kept` holds the bases already */
    const float *base;   /* bases by cells, [rows, ranks, cells] */
    float *kept;         /* the bases' blocks, from pass to pass; NULL if they are not to be kept */

    const float *alpha; /* [batch, rows, terms], the terms being ranks or cells */
    const float *cell;  /* E, by the steps above */
    /* Of each thread: of alpha, [batch, rows, padded terms], then of base, [rows, ranks, padded cells]; added to. NULL
       if not wanted. */
    float *alpha_gradient;
    float *cell_gradient; /* [parts, cells, ...], steps as of E; NULL if not wanted */
    index_t adds;         /* whether it is added to, where parts is 1 */
    float *memory;        /* of as many numbers as the pass's `_memory` function says */
} Pass;

/* Lanes of a block. */
static inline index_t block_lanes(const Pass *p) { return p->vectors * WIDTH; }

/* What a mixture is of. */
static inline index_t terms(const Pass *p) { return p->ranks ? p->ranks : p->cells; }

static inline index_t bases(const Pass *p) { return p->rows * p->ranks; }

/* The groups of a convolution, and channels of its source in each. */
static inline index_t all_groups(const Pass *p) { return p->groups * p->cell_groups; }

static inline index_t group_depths(const Pass *p) { return p->depths * p->depth_groups; }

/* Some channels of one sample as [positions, width], zero beyond them. */
static inline void read_map(const Map *map, const Windows *windows, index_t sample, index_t channel, index_t channels,
                            index_t width, float *mapped, float *to) {
    float *raw = windows->dimensions ? mapped : to;
    if (channels < width) memset(raw, 0, map->positions * width * sizeof(float));
    arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel, raw, width,
            map->positions, channels);
    if (windows->dimensions) read_windows(windows, raw, width, to);
}

/* Write rows of a block's lanes as some channels of one sample. */
static inline void write_map(const Pass *p, index_t sample, index_t channel, index_t channels, float *mapped,
                             const float *from) {
    if (p->out_windows.dimensions) write_windows(&p->out_windows, from, block_lanes(p), mapped), from = mapped;
    write_rows(&p->out, &p->epilogue, sample, channel, channels, block_lanes(p), 0, p->out.positions, from);
}

/* Cells that are fetched ahead of the one in use. */
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
        /* The lines of a cell are short and far apart: no hardware foresees the next cells'. */
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

/* Write, or add, a block of E's gradient as pack_cells lays it; backwards, lanes lie together in E. */
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

/* Read the source of samples from `first` on, [sample, group, depth group, tile's depths, position, depth]. */
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

/* What one thread does for a block's lanes of one group of a cell, of samples first to last; memory is its own. */
typedef void Work(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                  float *memory, float *alpha_gradient, float *cell_gradient, int add);

/* Do the work for all lanes and samples: a thread takes neighbouring blocks of lanes, or parts of their samples.
   Where every lane takes all of the source, it is read before, for all of them. */
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
