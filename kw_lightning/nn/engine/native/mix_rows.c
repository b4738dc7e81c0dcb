/* Mix kernels of convolutions with one kernel position as their cells lie, between maps whose channels lie together.

   For every sample b, position p and output channel (g, l), group and line of a cell,

       out[b, p, g, l] = sum over groups h of columns and columns d of source[b, p, h, d] * W[b, (g, h)][l, d],

   W[b, r] = sum over j of alpha[b, r, j] * E[j], where columns, the input channels, lie together in E as in maps. So
   cells are read as they lie, in long runs, once for some samples; no cell is turned, but forward the kernels are.

   Forward, a thread has lines of its own, so many that their kernels of some samples stay near. Backward, all threads
   share some lines at a time: their kernels' gradient is made of panels of both maps; then, by one run of all cells at
   a time, the kernels are mixed and their gradient is folded into those of alpha and E, which are taken as they lie,
   too; and at last the kernels add to the input's gradient. */

#include "runs.h"

/* Positions, and depths of a panel of kernels, that a product takes at a time: the first level holds the panel, the
   second the positions. */
#define POSITIONS 96
#define PANEL_DEPTHS 256
/* Positions over which kernels' gradients are summed at a time. */
#define SPAN 192
/* Of the gradient of alpha: mixtures and cells whose sums stay in registers. */
#define DOT_ROWS 4
#define DOT_CELLS 3

/* Mix the run of numbers of the kernels of samples, of which so many columns are a line, while the next one is read:
   number d of line l to to[l to_line + d / LANES to_panel + d % LANES]. */
static void mix_run(const Pass *p, const Runs *runs, index_t line, index_t columns, index_t first, index_t samples,
                    float *to, index_t to_row, index_t to_line, index_t to_panel, Reading *reading) {
    index_t start = runs->held.place - line * columns, numbers = runs->held.end - runs->held.place;
    const float *alpha = p->alpha + first * p->rows * p->cells;
    for (index_t i = 0, l = start / columns, d = start % columns; i < numbers; i += LANES, d += LANES) {
        if (d == columns) d = 0, l++;
        mix_reading(p, samples * p->rows, alpha, runs->block + i, to + l * to_line + d / LANES * to_panel, to_row,
                    to_panel, reading);
    }
}

/* Forward. */

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

/* Some lines of a cell, from `line` on, of samples. */
typedef struct {
    index_t line, lines, first, last;
} Item;

/* Of the lines of an item by LANES, and of those by a run's columns, line after line: the run number i. */
static Span run_of(const Pass *p, const Item *item, index_t i) {
    index_t cuts = pieces(p->depths, p->block_depths), panel = i / (cuts * LANES) * LANES;
    index_t lines = smaller(LANES, item->lines - panel), rest = i - panel * cuts;
    if (lines <= 0) return (Span){0, 0};
    index_t place = (item->line + panel + rest % lines) * p->depths, column = rest / lines * p->block_depths;
    return (Span){place + column, place + smaller(column + p->block_depths, p->depths)};
}

/* Mix the kernels of some samples, and turn them, by so few columns that all lines of a panel are near. Then comes
   another item, if any. */
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

/* The kernels of some lines of one sample on its source. */
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

/* Its samples one by one, those mixed together whose kernels stay near. */
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

/* Backward: lanes are columns, depths lines. */

/* The memory that all threads share, and, from `own` on, that of each: runs and sums of dot products. */
typedef struct {
    float *kernels, *gradient, *source, *other, *own;
} Shared;

/* Some lines of the kernels of some samples. */
typedef struct {
    index_t line, lines, first, samples;
} Part;

/* From mixture to mixture of a part, and from position to position of the panels of its lines. */
static index_t part_step(const Pass *p) { return p->lines * p->lanes + LANES; }
static index_t source_step(const Pass *p) { return (pieces(p->lines, 16) | 1) * 16; }

static index_t source_size(const Pass *p) { return p->depth_groups * p->source_positions * source_step(p); }
static index_t other_size(const Pass *p) { return p->lane_groups * p->lanes * p->source_positions; }

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
        float *panel = m->other + s * other_size(p);
        for (index_t i = from; i < to; i++, at += map->position)
            for (index_t d = 0; d < p->lanes * p->lane_groups; d += LANES) {
                STORE(panel + (d * p->source_positions + i * LANES), LOAD(at + d));
                STORE(panel + (d * p->source_positions + i * LANES) + WIDTH, LOAD(at + d + WIDTH));
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

/* What the lines of one sample add to the gradient of the input at some positions. */
static void add_to_input(const Pass *p, const Part *k, index_t s, index_t from, index_t count, const Shared *m) {
    float *out = p->out.data + (k->first + s) * p->out.batch + from * p->out.position;
    const float *kernels = m->kernels + s * p->rows * part_step(p), *source = m->source + s * source_size(p);
    for (index_t h = 0; h < p->lane_groups; h++)
        for (index_t d = 0; d < p->lanes; d += LANES)
            for (index_t g = 0; g < p->depth_groups; g++)
                product(count, 2, k->lines, source + (g * p->source_positions + from) * source_step(p), source_step(p),
                        1, kernels + (g * p->row_depth + h * p->row_lane) * part_step(p) + d * k->lines, LANES,
                        out + h * p->lanes + d, p->out.position, k->line > 0 || g > 0);
}

/* The gradient of one sample's kernels at some panels of columns: some positions at a time, which stay near. */
static void differentiate(const Pass *p, const Part *k, index_t s, index_t panel, index_t end, const Shared *m) {
    const float *source = m->source + s * source_size(p), *other = m->other + s * other_size(p);
    float *gradient = m->gradient + s * p->rows * part_step(p);
    for (index_t from = 0; from < p->source_positions; from += SPAN)
        for (index_t column = panel * LANES; column < end * LANES; column += LANES)
            for (index_t g = 0; g < p->depth_groups; g++)
                product(
                    k->lines, 2, smaller(SPAN, p->source_positions - from),
                    source + (g * p->source_positions + from) * source_step(p), 1, source_step(p),
                    other + column * p->source_positions + from * LANES, LANES,
                    gradient + (g * p->row_depth + column / p->lanes * p->row_lane) * part_step(p) + column % p->lanes,
                    p->lanes, from > 0);
}

static void add_all_to_input(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(p->source_positions, POSITIONS), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < items; i++) {
        index_t from = p->source_positions * (i % blocks) / blocks;
        add_to_input(p, k, i / blocks, from, p->source_positions * (i % blocks + 1) / blocks - from, m);
    }
}

static void differentiate_all(const Pass *p, const Part *k, const Shared *m) {
    index_t panels = p->lane_groups * p->lanes / LANES, items = k->samples * panels;
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

/* From the gradient of a run of numbers of kernels, its part of that of alpha. */
static void fold_into_alpha(const Pass *p, index_t numbers, index_t rows, const float *gradient, const float *block,
                            float *sums) {
    for (index_t j = 0; j < p->cells; j += DOT_CELLS)
        for (index_t r = 0; r < rows; r += DOT_ROWS) {
            const float *a[DOT_ROWS], *b[DOT_CELLS];
            for (index_t i = 0; i < DOT_ROWS; i++) a[i] = gradient + smaller(r + i, rows - 1) * part_step(p);
            for (index_t i = 0; i < DOT_CELLS; i++) b[i] = block + smaller(j + i, p->cells - 1) * block_step(p);
            dot(numbers, a, b, sums + r * sums_row(p) + j * WIDTH, sums_row(p));
        }
}

/* And of that of E, a few cells at a time, while the next ones' is brought. */
static void fold_into_cells(const Pass *p, index_t numbers, index_t rows, const float *gradient, const float *alpha,
                            float *to, int add) {
    for (index_t j = 0; j < p->cells; j += ROWS, to += ROWS * p->cell_step)
        for (index_t i = 0; i < numbers; i += LANES) {
            for (index_t next = ROWS; next < 2 * ROWS && j + next < p->cells; next++)
                for (index_t e = 0; e < LANES; e += 16) __builtin_prefetch(to + next * p->cell_step + i + e, 1);
            product(smaller(ROWS, p->cells - j), 2, rows, alpha + j, 1, p->cells, gradient + i, part_step(p), to + i,
                    p->cell_step, add);
        }
}

/* By a run of all cells at a time, which is read once: mix the kernels, and fold their gradient. */
static void mix_and_fold(const Pass *p, const Part *k, const Shared *m, int add) {
    index_t rows = k->samples * p->rows, numbers = k->lines * p->lanes, start = k->line * p->lanes;
    index_t count = pieces(numbers, p->block_depths);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Runs runs = runs_in(p, m->own + thread * own_size(p));
        Span all = {start + count * thread / p->threads * p->block_depths,
                    start + smaller(count * (thread + 1) / p->threads * p->block_depths, numbers)};
        for (Span run = first_run(p, all), next; any(run); run = next) {
            index_t from = run.place - start, length = run.end - run.place;
            next = first_run(p, (Span){run.end, all.end});
            take_run(p, &runs, run);
            Reading reading = start_reading(p, next, runs.spare, p->block_depths);
            if (p->out.data)
                mix_run(p, &runs, k->line, p->lanes, k->first, k->samples, m->kernels, part_step(p), LANES,
                        LANES * k->lines, &reading);
            if (p->other.data && p->alpha_gradient)
                fold_into_alpha(p, length, rows, m->gradient + from, runs.block, sums_of(p, m, thread));
            if (p->other.data && p->cell_gradient)
                fold_into_cells(p, length, rows, m->gradient + from, p->alpha + k->first * p->rows * p->cells,
                                p->cell_gradient + run.place, add);
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
        if (p->alpha_gradient) add_up_sums(p, b, k.samples, &m);
    }
}
