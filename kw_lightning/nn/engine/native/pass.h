/* What a pass is told, and how it reads and writes maps and cells. */

#ifndef KW_PASS_H
#define KW_PASS_H

#include "tiles.h"

/* Positions made as sums of others: row i adds term[k] for start[i] <= k < start[i + 1], where a term is a position
   plus 1, negative if to be subtracted. No sums where start is NULL. */
typedef struct {
    const int32_t *start, *term;
} Sums;

/* A tensor [batch, channels, positions] by its steps, in numbers. */
typedef struct {
    float *data;
    index_t batch, channel, position, positions;
} Map;

/* The same order as in passes.py. */
typedef struct {
    index_t batch, rows, cells;                       /* samples; mixtures of a sample; n */
    index_t lanes, depths, lane_groups, depth_groups; /* of a cell; cells along the kernel */
    index_t row_tap, row_lane, row_depth;             /* mixture (t, g, h) = t row_tap + g row_lane + h row_depth */
    index_t cell_step, lane_step, depth_step;         /* in E, in numbers */
    index_t out_positions, source_positions;          /* of the pass, after and before `Sums` */
    Map out, source, other;                           /* other: what the kernels' gradient takes beside source */
    Sums out_sums, source_sums, other_sums;
    index_t taps, tiles, spans;
    const int32_t *tile_start, *tile; /* a tile: count, taps, [count] positions, then for each tap: t, [count] reads */
    const int32_t *reads;             /* [taps, output positions of the convolution]: what each reads, -1 for none */
    const int32_t *span;              /* of the kernels' gradient, each: t, whether it adds, runs from, to */
    const int32_t *run;               /* each: source, other, step of other, length */
    index_t chunk, group, samples, parts, threads; /* see passes.py */
    const float *alpha, *cell;
    float *alpha_gradient; /* [threads, batch, rows, padded cells], added to; NULL if not wanted */
    float *cell_gradient;  /* [parts, cells, ...]; NULL if not wanted */
    float *memory;
} Pass;

/* to[i] = the sums of rows of `from`, both [positions, width]. */
static inline void add_up(const Sums *sums, const float *from, float *to, index_t positions, index_t width) {
    index_t whole = width / WIDTH * WIDTH;
    for (index_t i = 0; i < positions; i++, to += width) {
        const int32_t *term = sums->term + sums->start[i], *end = sums->term + sums->start[i + 1];
        for (index_t column = 0; column < whole; column += WIDTH) {
            vector sum = {0};
            for (const int32_t *t = term; t < end; t++)
                sum += (*t > 0 ? 1.0f : -1.0f) * LOAD(from + ((*t > 0 ? *t : -*t) - 1) * width + column);
            STORE(to + column, sum);
        }
        for (index_t column = whole; column < width; column++) {
            to[column] = 0;
            for (const int32_t *t = term; t < end; t++)
                to[column] += (*t > 0 ? 1.0f : -1.0f) * from[((*t > 0 ? *t : -*t) - 1) * width + column];
        }
    }
}

/* Some channels of one sample as [positions, width], zero beyond them. */
static inline void read_map(const Map *map, const Sums *sums, index_t sample, index_t channel, index_t channels,
                            index_t positions, index_t width, float *mapped, float *to) {
    float *raw = sums->start ? mapped : to;
    if (channels < width) memset(raw, 0, map->positions * width * sizeof(float));
    arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel, raw, width,
            map->positions, channels);
    if (sums->start) add_up(sums, raw, to, positions, width);
}

static inline void write_map(const Map *map, const Sums *sums, index_t sample, index_t channel, index_t channels,
                             float *mapped, const float *from) {
    float *to = map->data + sample * map->batch + channel * map->channel;
    if (sums->start) add_up(sums, from, mapped, map->positions, LANES), from = mapped;
    if (map->channel == 1)
        arrange(from, LANES, 1, to, map->position, map->positions, channels);
    else
        arrange(from, 1, LANES, to, map->channel, channels, map->positions);
}

/* block[d * depth_step + j * cell_step + l] = E[j][depth + d][lane + l]. */
static inline void pack_cells(const Pass *p, index_t lane, index_t lanes, index_t depth, index_t depths, float *block,
                              index_t cell_step, index_t depth_step) {
    int turned = p->depth_step == 1;
    index_t lines = turned ? lanes : depths, line = turned ? depths : lanes;
    if (lanes < LANES) memset(block, 0, depths * p->cells * LANES * sizeof(float));
    for (index_t j = 0; j < p->cells; j++) {
        const float *cell = p->cell + j * p->cell_step + lane * p->lane_step + depth * p->depth_step;
        /* The lines of a cell are short and far apart: no hardware foresees the next cell's. */
        for (index_t i = 0; j + 1 < p->cells && i < lines; i++)
            for (index_t k = 0; k < line; k += 16)
                __builtin_prefetch(cell + p->cell_step + i * (turned ? p->lane_step : p->depth_step) + k);
        arrange(cell, p->depth_step, p->lane_step, block + j * cell_step, depth_step, depths, lanes);
    }
}

/* turned[panel of LANES cells][d, l][cell] = block[d][j][l], the right side of the product for alpha's gradient. */
static inline void turn_cells(const Pass *p, index_t depths, const float *block, float *turned) {
    for (index_t j = 0; j < p->cells; j += LANES) {
        index_t count = smaller(LANES, p->cells - j);
        float *panel = turned + j * depths * LANES;
        if (count < LANES) memset(panel, 0, depths * LANES * LANES * sizeof(float));
        for (index_t d = 0; d < depths; d++)
            arrange(block + (d * p->cells + j) * LANES, 1, LANES, panel + d * LANES * LANES, LANES, LANES, count);
    }
}

/* Write, or add, a block of E's gradient as pack_cells lays it; backwards, lanes lie together in E. */
static inline void unpack_cells(const Pass *p, index_t lane, index_t lanes, index_t depth, index_t depths,
                                const float *block, index_t cell_step, index_t depth_step, float *to, int add) {
    for (index_t j = 0; j < p->cells; j++)
        for (index_t d = 0; d < depths; d++) {
            float *line = to + j * p->cell_step + (depth + d) * p->depth_step + lane;
            const float *from = block + j * cell_step + d * depth_step;
            for (index_t l = 0; l < lanes; l++) line[l] = add ? line[l] + from[l] : from[l];
        }
}

INLINE index_t sample_size(const Pass *p) { return p->source_positions * p->depths * p->depth_groups; }

/* Read the source of samples from `first` on, [sample, group, chunk of depths, position, depth], into `to`. */
static inline void read_source(const Pass *p, index_t first, index_t samples, float *to, float *scratch,
                               index_t scratch_step) {
    index_t chunks = pieces(p->depths, p->chunk), count = samples * p->depth_groups * chunks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = count * thread / p->threads; i < count * (thread + 1) / p->threads; i++) {
            index_t depth = i % chunks * p->chunk, depths = smaller(p->chunk, p->depths - depth);
            index_t channel = i / chunks % p->depth_groups * p->depths + depth, b = i / chunks / p->depth_groups;
            read_map(&p->source, &p->source_sums, first + b, channel, depths, p->source_positions, depths,
                     scratch + thread * scratch_step, to + b * sample_size(p) + channel * p->source_positions);
        }
}

/* What one thread does for LANES lanes of samples first to last; memory is its own. */
typedef void Work(const Pass *p, index_t lane, index_t first, index_t last, const float *source, float *memory,
                  float *alpha_gradient, float *cell_gradient, int add);

/* Do the work for all lanes and samples: a thread takes neighbouring blocks of lanes, or parts of their samples.
   Where every lane takes all of the source, it is read before, for all of them. */
static inline void share_out(const Pass *p, index_t memory, int shared, Work *work) {
    index_t items = pieces(p->lanes, LANES) * p->parts, gradients = p->batch * p->rows * padded(p->cells);
    float *source = p->memory, *own = source + (shared ? p->samples * sample_size(p) : 0);
    for (index_t first = 0; first < p->batch; first += p->samples) {
        index_t samples = smaller(p->samples, p->batch - first);
        if (shared) read_source(p, first, samples, source, own, memory);
#pragma omp parallel for schedule(static) num_threads(p->threads)
        for (index_t thread = 0; thread < p->threads; thread++)
            for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
                index_t part = i % p->parts, from = samples * part / p->parts, to = samples * (part + 1) / p->parts;
                if (from == to) continue;
                work(p, i / p->parts * LANES, first + from, first + to, source + from * sample_size(p),
                     own + thread * memory, p->alpha_gradient ? p->alpha_gradient + thread * gradients : NULL,
                     p->cell_gradient ? p->cell_gradient + part * p->cells * p->cell_step : NULL,
                     first > 0 || p->parts > 1);
            }
    }
}

#endif
