/* The gradients of mix_rows.c: lanes are its columns, input channels, and depths its lines, output channels.

   All threads share some lines at a time: their kernels' gradient is made of panels of both maps; then, by one run of
   all cells at a time, the kernels are mixed and their gradient is folded into those of alpha and E, which are taken as
   they lie, too; and at last the kernels add to the input's gradient. Maps whose channels come first are turned as they
   are read; the gradient of such an input is summed up channels last, and turned at the end. */

#include "runs.h"

/* Positions that add to the input's gradient at a time, and lines of all groups, whose sums are moved once. */
#define POSITIONS 96
#define TERMS 64
/* About the positions over which kernels' gradients are summed at a time. */
#define SPAN 192
/* Columns that are turned together. */
#define TURNED 64
/* Of the gradient of alpha: mixtures and cells whose sums stay in registers. */
#define DOT_ROWS 4
#define DOT_CELLS 3

/* The memory that all threads share, and, from `own` on, that of each: runs and sums of dot products. `out` is for the
   input's gradient where it is not summed up in its place. */
typedef struct {
    float *kernels, *gradient, *source, *other, *out, *own;
} Shared;

/* Some lines of the kernels of some samples. */
typedef struct {
    index_t line, lines, first, samples;
} Part;

/* From mixture to mixture of a part, and from position to position of the panels of its lines. */
static index_t part_step(const Pass *p) { return p->lines * p->lanes + LANES; }
static index_t source_step(const Pass *p) { return (pieces(p->lines, 16) | 1) * 16; }

static index_t source_size(const Pass *p) { return p->depth_groups * p->source_positions * source_step(p); }
static index_t columns(const Pass *p) { return p->lane_groups * p->lanes; }
static index_t other_size(const Pass *p) { return columns(p) * p->source_positions; }
static int turns_out(const Pass *p) { return p->out.data && p->out.channel != 1; }

/* From mixture to mixture of the sums of dot products, of which each lane is added up at last. */
static index_t sums_row(const Pass *p) { return pieces(p->cells, DOT_CELLS) * DOT_CELLS * WIDTH; }
static index_t sums_size(const Pass *p) {
    return p->alpha_gradient ? pieces(p->mixed_samples * p->rows, DOT_ROWS) * DOT_ROWS * sums_row(p) : 0;
}
static index_t own_size(const Pass *p) { return runs_size(p) + padded(sums_size(p)); }

static index_t lay_out_shared(const Pass *p, float *at, Shared *m) {
    float *start = at;
    index_t kernels = p->mixed_samples * p->rows * part_step(p);
    m->kernels = at, at += p->out.data ? kernels : 0;
    m->gradient = at, at += p->other.data ? kernels : 0;
    m->source = at, at += p->mixed_samples * source_size(p);
    m->other = at, at += p->other.data ? p->mixed_samples * other_size(p) : 0;
    m->out = at, at += turns_out(p) ? p->mixed_samples * other_size(p) : 0;
    m->own = at, at += p->threads * own_size(p);
    return padded(at - start);
}

index_t kw_mix_rows_backward_memory(const Pass *p) { return lay_out_shared(p, NULL, &(Shared){0}); }

static float *sums_of(const Pass *p, const Shared *m, index_t thread) {
    return m->own + thread * own_size(p) + runs_size(p);
}

/* The columns of samples in panels, [sample, group][LANES columns][position][column]. */
static void read_columns(const Pass *p, const Part *k, const Shared *m) {
    const Map *map = &p->other;
    index_t blocks = pieces(p->source_positions, SPAN), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t item = 0; item < items; item++) {
        index_t s = item / blocks, from = item % blocks * SPAN, to = smaller(from + SPAN, p->source_positions);
        const float *at = map->data + (k->first + s) * map->batch + from * map->position;
        float *panel = m->other + s * other_size(p) + from * LANES;
        if (map->channel != 1) {
            for (index_t d = 0; d < columns(p); d += LANES)
                arrange(at + d * map->channel, map->position, map->channel, panel + d * p->source_positions, LANES,
                        to - from, LANES);
            continue;
        }
        for (index_t i = from; i < to; i++, at += map->position, panel += LANES)
            for (index_t d = 0; d < columns(p); d += LANES) {
                STORE(panel + d * p->source_positions, LOAD(at + d));
                STORE(panel + d * p->source_positions + WIDTH, LOAD(at + d + WIDTH));
            }
    }
}

/* The lines of samples, [sample, group][position][line]. */
static void read_lines(const Pass *p, const Part *k, const Shared *m) {
    const Map *map = &p->source;
    index_t maps = k->samples * p->depth_groups;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < maps; i++) {
        index_t sample = k->first + i / p->depth_groups, channel = i % p->depth_groups * p->depths + k->line;
        arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel,
                m->source + i * p->source_positions * source_step(p), source_step(p), p->source_positions, k->lines);
    }
}

/* c[r] = or += sum over groups g and k of a[g, r, k] * b[g, k], for rows of two vectors: product_rows of some groups,
   whose sums are read and written once for all of them. */
INLINE void group_rows(const int rows, index_t groups, index_t length, const float *a, index_t a_row, index_t a_group,
                       const float *b, index_t b_group, float *c, index_t c_row, int add) {
    vector sum[ROWS][2];
    EACH_ROW(rows) {
        sum[r][0] = add ? LOAD(c + r * c_row) : (vector){0};
        sum[r][1] = add ? LOAD(c + r * c_row + WIDTH) : (vector){0};
    }
    for (index_t g = 0; g < groups; g++)
        for (index_t k = 0; k < length; k++) {
            const float *from = a + g * a_group + k, *at = b + g * b_group + k * LANES;
            vector b0 = LOAD(at), b1 = LOAD(at + WIDTH);
            EACH_ROW(rows) {
                sum[r][0] += from[r * a_row] * b0;
                sum[r][1] += from[r * a_row] * b1;
            }
        }
    EACH_ROW(rows) {
        STORE(c + r * c_row, sum[r][0]);
        STORE(c + r * c_row + WIDTH, sum[r][1]);
    }
}

/* The same for any number of rows, cut evenly. */
static void product_of_groups(index_t rows, index_t groups, index_t length, const float *a, index_t a_row,
                              index_t a_group, const float *b, index_t b_group, float *c, index_t c_row, int add) {
    for (index_t tiles = pieces(rows, ROWS), first = 0; tiles > 0; tiles--) {
        index_t count = (rows - first) / tiles;
        const float *at = a + first * a_row;
        float *to = c + first * c_row;
        first += count;
        switch (count) {
#define CASE(N)                                                                        \
    case N:                                                                            \
        group_rows(N, groups, length, at, a_row, a_group, b, b_group, to, c_row, add); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

/* What the lines of one sample add to the gradient of the input at some positions. */
static void add_to_input(const Pass *p, const Part *k, index_t s, index_t from, index_t count, const Shared *m) {
    index_t step = turns_out(p) ? columns(p) : p->out.position;
    float *out = turns_out(p) ? m->out + s * other_size(p) : p->out.data + (k->first + s) * p->out.batch;
    const float *kernels = m->kernels + s * p->rows * part_step(p);
    const float *source = m->source + s * source_size(p) + from * source_step(p);
    index_t source_group = p->source_positions * source_step(p), kernel_group = p->row_depth * part_step(p);
    index_t together = larger(TERMS / k->lines, 1);
    for (index_t h = 0; h < p->lane_groups; h++)
        for (index_t d = 0; d < p->lanes; d += LANES)
            for (index_t g = 0; g < p->depth_groups; g += together)
                product_of_groups(count, smaller(together, p->depth_groups - g), k->lines, source + g * source_group,
                                  source_step(p), source_group,
                                  kernels + h * p->row_lane * part_step(p) + d * k->lines + g * kernel_group,
                                  kernel_group, out + from * step + h * p->lanes + d, step, k->line > 0 || g > 0);
}

/* The gradient of one sample's kernels at some panels of columns: some positions at a time, which stay near. */
static void differentiate(const Pass *p, const Part *k, index_t s, index_t panel, index_t end, const Shared *m) {
    const float *source = m->source + s * source_size(p), *other = m->other + s * other_size(p);
    float *gradient = m->gradient + s * p->rows * part_step(p);
    index_t spans = larger((p->source_positions + SPAN / 2) / SPAN, 1);
    for (index_t span = 0; span < spans; span++) {
        index_t from = p->source_positions * span / spans, to = p->source_positions * (span + 1) / spans;
        for (index_t column = panel * LANES; column < end * LANES; column += LANES)
            for (index_t g = 0; g < p->depth_groups; g++)
                product(
                    k->lines, 2, to - from, source + (g * p->source_positions + from) * source_step(p), 1,
                    source_step(p), other + column * p->source_positions + from * LANES, LANES,
                    gradient + (g * p->row_depth + column / p->lanes * p->row_lane) * part_step(p) + column % p->lanes,
                    p->lanes, span > 0);
    }
}

static void add_all_to_input(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(p->source_positions, POSITIONS), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < items; i++) {
        index_t from = p->source_positions * (i % blocks) / blocks;
        add_to_input(p, k, i / blocks, from, p->source_positions * (i % blocks + 1) / blocks - from, m);
    }
}

/* The gradient of the input, [sample][position][column], to where channels come first. */
static void write_columns(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(columns(p), TURNED), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < items; i++) {
        index_t first = i % blocks * TURNED;
        arrange(m->out + i / blocks * other_size(p) + first, 1, columns(p),
                p->out.data + (k->first + i / blocks) * p->out.batch + first * p->out.channel, p->out.channel,
                smaller(TURNED, columns(p) - first), p->source_positions);
    }
}

static void differentiate_all(const Pass *p, const Part *k, const Shared *m) {
    index_t panels = columns(p) / LANES, items = k->samples * panels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        index_t first = items * thread / p->threads, last = items * (thread + 1) / p->threads;
        for (index_t s = first / panels; s * panels < last; s++)
            differentiate(p, k, s, larger(first - s * panels, 0), smaller(last - s * panels, panels), m);
    }
}

/* sums[r][j] += a[r] * b[j], number by number, for some mixtures and cells. */
static void dot(index_t numbers, const float *const *a, const float *const *b, float *sums, index_t row) {
    vector sum[DOT_ROWS][DOT_CELLS];
    const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *b0 = b[0], *b1 = b[1], *b2 = b[2];
    for (int r = 0; r < DOT_ROWS; r++)
        for (int j = 0; j < DOT_CELLS; j++) sum[r][j] = (vector){0};
    for (index_t d = 0; d < numbers; d += WIDTH) {
        vector c0 = LOAD(b0 + d), c1 = LOAD(b1 + d), c2 = LOAD(b2 + d), v = LOAD(a0 + d);
        KEEP(c0);
        KEEP(c1);
        KEEP(c2);
        KEEP(v);
        sum[0][0] += v * c0, sum[0][1] += v * c1, sum[0][2] += v * c2, v = LOAD(a1 + d);
        KEEP(v);
        sum[1][0] += v * c0, sum[1][1] += v * c1, sum[1][2] += v * c2, v = LOAD(a2 + d);
        KEEP(v);
        sum[2][0] += v * c0, sum[2][1] += v * c1, sum[2][2] += v * c2, v = LOAD(a3 + d);
        KEEP(v);
        sum[3][0] += v * c0, sum[3][1] += v * c1, sum[3][2] += v * c2;
    }
    for (int r = 0; r < DOT_ROWS; r++)
        for (int j = 0; j < DOT_CELLS; j++) {
            float *to = sums + r * row + j * WIDTH;
            STORE(to, LOAD(to) + sum[r][j]);
        }
}

/* Where the gradient of a few cells is brought from, line by line of the cache, before it is added to. */
typedef struct {
    const float *at, *end;
    index_t numbers, step;
} Bringing;

static void bring(Bringing *b, index_t lines) {
    for (; lines > 0; lines--) {
        __builtin_prefetch(b->at, 1);
        b->at += 16;
        if (b->at == b->end) b->at += b->step - b->numbers, b->end += b->step;
    }
}

/* From the gradient of a run of numbers of kernels, its part of that of alpha by a few cells; meanwhile comes theirs.
 */
static void fold_into_alpha(const Pass *p, index_t numbers, index_t rows, const float *gradient, const float *block,
                            index_t cells, float *sums, float *to) {
    Bringing bringing = {to, to + numbers, numbers, p->cell_step};
    index_t left = to ? cells * numbers / 16 : 0, calls = pieces(cells, DOT_CELLS) * pieces(rows, DOT_ROWS);
    index_t each = pieces(left, calls);
    for (index_t j = 0; j < cells; j += DOT_CELLS)
        for (index_t r = 0; r < rows; r += DOT_ROWS) {
            const float *a[DOT_ROWS], *b[DOT_CELLS];
            for (index_t i = 0; i < DOT_ROWS; i++) a[i] = gradient + smaller(r + i, rows - 1) * part_step(p);
            for (index_t i = 0; i < DOT_CELLS; i++) b[i] = block + smaller(j + i, cells - 1) * block_step(p);
            bring(&bringing, smaller(each, left));
            left -= smaller(each, left);
            dot(numbers, a, b, sums + r * sums_row(p) + j * WIDTH, sums_row(p));
        }
}

/* A run of the kernels' gradient, folded into that of alpha and that of E, a few cells at a time. */
static void fold_run(const Pass *p, const Part *k, Span run, const float *block, const Shared *m, float *sums,
                     int add) {
    index_t rows = k->samples * p->rows, numbers = run.end - run.place;
    const float *gradient = m->gradient + run.place - k->line * p->lanes;
    const float *alpha = p->alpha + k->first * p->rows * p->cells;
    for (index_t j = 0; j < p->cells; j += ROWS) {
        index_t cells = smaller(ROWS, p->cells - j);
        float *to = p->cell_gradient ? p->cell_gradient + run.place + j * p->cell_step : NULL;
        if (p->alpha_gradient)
            fold_into_alpha(p, numbers, rows, gradient, block + j * block_step(p), cells, sums + j * WIDTH, to);
        for (index_t i = 0; to && i < numbers; i += LANES)
            product(cells, 2, rows, alpha + j, 1, p->cells, gradient + i, part_step(p), to + i, p->cell_step, add);
    }
}

/* By a run of all cells at a time, which is read once: mix the kernels, and fold their gradient. */
static void mix_and_fold(const Pass *p, const Part *k, const Shared *m, int add) {
    index_t numbers = k->lines * p->lanes, start = k->line * p->lanes, count = pieces(numbers, p->block_depths);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Runs runs = runs_in(p, m->own + thread * own_size(p));
        Span all = {start + count * thread / p->threads * p->block_depths,
                    start + smaller(count * (thread + 1) / p->threads * p->block_depths, numbers)};
        for (Span run = first_run(p, all), next; any(run); run = next) {
            next = first_run(p, (Span){run.end, all.end});
            take_run(p, &runs, run);
            Reading reading = start_reading(p, next, runs.spare, p->block_depths);
            if (p->out.data)
                mix_run(p, &runs, k->line, p->lanes, k->first, k->samples, m->kernels, part_step(p), LANES,
                        LANES * k->lines, &reading);
            if (p->other.data) fold_run(p, k, run, runs.block, m, sums_of(p, m, thread), add);
            end_reading(&runs, &reading, next);
        }
    }
}

/* The gradient of alpha of some samples, from the sums of all threads. */
static void add_up_sums(const Pass *p, index_t first, index_t samples, const Shared *m) {
    float *to = p->alpha_gradient + first * p->rows * padded(p->cells);
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t r = 0; r < samples * p->rows; r++)
            for (index_t j = 0; j < p->cells; j++) {
                const float *sum = sums_of(p, m, thread) + r * sums_row(p) + j * WIDTH;
                for (int i = 0; i < WIDTH; i++) to[r * padded(p->cells) + j] += sum[i];
            }
}

void kw_mix_rows_backward(const Pass *p) {
    Shared m;
    lay_out_shared(p, p->memory, &m);
    for (index_t b = 0; b < p->batch; b += p->mixed_samples) {
        Part k = {0, 0, b, smaller(p->mixed_samples, p->batch - b)};
        if (p->other.data) read_columns(p, &k, &m);
        for (index_t thread = 0; p->alpha_gradient && thread < p->threads; thread++)
            memset(sums_of(p, &m, thread), 0, sums_size(p) * sizeof(float));
        for (; k.line < p->depths; k.line += k.lines) {
            k.lines = smaller(p->lines, p->depths - k.line);
            read_lines(p, &k, &m);
            if (p->other.data) differentiate_all(p, &k, &m);
            mix_and_fold(p, &k, &m, p->adds || b > 0);
            if (p->out.data) add_all_to_input(p, &k, &m);
        }
        if (turns_out(p)) write_columns(p, &k, &m);
        if (p->alpha_gradient) add_up_sums(p, b, k.samples, &m);
    }
}
