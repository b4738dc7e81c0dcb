/* Kernels of one position, mixed as their cells lie, between maps whose channels come last.

   For every sample b, position p and output channel (g, l), line l of lane group g,

       out[b, p, g, l] = sum over groups h of columns and columns d of source[b, p, h, d] * W[b, (g, h)][l, d],

   W[b, r] = sum over j of alpha[b, r, j] * E[j]. Columns, the input channels, are contiguous in E as in maps. So cells
   are read as they lie, in long runs, once for `mixed_samples`; kernels are transposed instead of cells. A thread has
   lines of its own, `lines` at a time, so few that their kernels of these samples stay in the cache. Backwards:
   mix_rows_backward.c. */

#include "runs.h"

/* Positions, and depths of a panel of kernels, that a product takes at a time: the first-level cache holds the panel,
   the second the positions. */
#define POSITIONS 96
#define PANEL_DEPTHS 256

/* The memory of one thread. */
typedef struct {
    float *lying, *kernels, *out;
    Runs runs;
} Memory;

static index_t lying_step(const Pass *p) { return LANES * p->block_depths + LANES; }
static index_t channels(const Pass *p) { return p->depths * p->depth_groups; }

/* Kernels of some lines, [sample, group of lines][panel][column of all groups][LANES lines]. */
static index_t panels(const Pass *p) { return pieces(p->lines, LANES); }
static index_t kernel_step(const Pass *p) { return panels(p) * channels(p) * LANES + LANES; }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    m->runs = runs_in(p, at), at += runs_size(p);
    m->lying = at, at += p->mixed_samples * p->rows * lying_step(p);
    m->kernels = at, at += p->mixed_samples * p->lane_groups * kernel_step(p);
    m->out = at, at += p->lane_groups * panels(p) * POSITIONS * LANES;
    return padded(at - start);
}

index_t kw_mix_rows_memory(const Pass *p) { return p->threads * lay_out(p, NULL, &(Memory){0}); }

/* Some lines of a cell, from `line` on, for samples `first` to `last`. */
typedef struct {
    index_t line, lines, first, last;
} Item;

/* Run i of an item: LANES lines at a time, of these the columns of a run at a time, and of those line after line. */
static Span run_of(const Pass *p, const Item *item, index_t i) {
    index_t cuts = pieces(p->depths, p->block_depths), panel = i / (cuts * LANES) * LANES;
    index_t lines = smaller(LANES, item->lines - panel), rest = i - panel * cuts;
    if (lines <= 0) return (Span){0, 0};
    index_t place = (item->line + panel + rest % lines) * p->depths, column = rest / lines * p->block_depths;
    return (Span){place + column, place + smaller(column + p->block_depths, p->depths)};
}

/* Mix the kernels of some samples, and transpose them, by so few columns that all lines of a panel stay in the cache.
   At the end the first run of the item `then` is read, if it has any. */
static void mix_panels(const Pass *p, const Item *item, const Item *then, index_t first, index_t samples, Memory *m) {
    index_t runs = item->lines * pieces(p->depths, p->block_depths);
    if (item->lines % LANES) memset(m->kernels, 0, samples * p->lane_groups * kernel_step(p) * sizeof(float));
    for (index_t i = 0; i < runs; i++) {
        Span run = run_of(p, item, i), next = i + 1 < runs ? run_of(p, item, i + 1) : run_of(p, then, 0);
        index_t line = run.place / p->depths, column = run.place % p->depths, l = line - item->line;
        take_run(p, &m->runs, run);
        Reading reading = start_reading(p, next, m->runs.spare, p->depths);
        mix_run(p, &m->runs, line, p->depths, first, samples, m->lying + l % LANES * p->block_depths - column,
                lying_step(p), 0, LANES, &reading);
        end_reading(&m->runs, &reading, next);
        if (l + 1 < item->lines && (l + 1) % LANES) continue;
        for (index_t r = 0; r < samples * p->rows; r++)
            arrange(m->lying + r * lying_step(p), 1, p->block_depths,
                    m->kernels + r / p->depth_groups * kernel_step(p) +
                        (l / LANES * channels(p) + r % p->depth_groups * p->depths + column) * LANES,
                    LANES, run.end - run.place, l % LANES + 1);
    }
}

/* Apply the kernels of some lines of one sample to its source. */
static void apply(const Pass *p, index_t line, index_t lines, index_t sample, const float *kernels, const Memory *m) {
    const Map *map = &p->source;
    index_t blocks = pieces(p->out_positions, POSITIONS), cuts = pieces(channels(p), PANEL_DEPTHS);
    for (index_t i = 0; i < blocks; i++) {
        index_t from = p->out_positions * i / blocks, count = p->out_positions * (i + 1) / blocks - from;
        const float *rows = map->data + sample * map->batch + from * map->position;
        for (index_t c = 0; c < cuts; c++) {
            index_t depth = channels(p) * c / cuts, depths = channels(p) * (c + 1) / cuts - depth;
            for (index_t g = 0; g < p->lane_groups; g++)
                for (index_t l = 0; l < lines; l += LANES)
                    product(count, 2, depths, rows + depth, map->position, 1,
                            kernels + g * kernel_step(p) + (l / LANES * channels(p) + depth) * LANES, LANES,
                            m->out + (g * panels(p) + l / LANES) * POSITIONS * LANES, LANES, c > 0);
        }
        for (index_t g = 0; g < p->lane_groups; g++)
            for (index_t l = 0; l < lines; l += LANES)
                write_rows(&p->out, &p->epilogue, sample, g * p->lanes + line + l, smaller(LANES, lines - l), LANES,
                           from, count, m->out + (g * panels(p) + l / LANES) * POSITIONS * LANES);
    }
}

/* All samples of an item: the kernels of mixed_samples, which stay in the cache, then these one by one. */
static void run_item(const Pass *p, const Item *item, const Item *then, Memory *m) {
    for (index_t b = item->first; b < item->last; b += p->mixed_samples) {
        index_t samples = smaller(p->mixed_samples, item->last - b);
        mix_panels(p, item, b + samples < item->last ? item : then, b, samples, m);
        for (index_t s = 0; s < samples; s++)
            apply(p, item->line, item->lines, b + s, m->kernels + s * p->lane_groups * kernel_step(p), m);
    }
}

static Item item_of(const Pass *p, index_t i) {
    index_t line = i / p->parts * p->lines, part = i % p->parts;
    return (Item){line, smaller(p->lines, p->lanes - line), p->batch * part / p->parts,
                  p->batch * (part + 1) / p->parts};
}

void kw_mix_rows(const Pass *p) {
    index_t memory = lay_out(p, NULL, &(Memory){0}), blocks = pieces(p->lanes, p->lines), items = blocks * p->parts;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Memory m;
        lay_out(p, p->memory + thread * memory, &m);
        index_t end = items * (thread + 1) / p->threads;
        for (index_t i = items * thread / p->threads; i < end; i++) {
            Item item = item_of(p, i), then = i + 1 < end ? item_of(p, i + 1) : (Item){0};
            run_item(p, &item, &then, &m);
        }
    }
}
