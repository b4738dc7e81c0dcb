/* Mix kernels of convolutions with one kernel position as their cells lie, between maps whose channels lie together.

   For every sample b, position p and output channel (g, l), group and line of a cell,

       out[b, p, g, l] = sum over groups h of columns and columns d of source[b, p, h, d] * W[b, (g, h)][l, d],

   W[b, r] = sum over j of alpha[b, r, j] * E[j], where columns, the input channels, lie together in E as in maps. So
   cells are read as they lie, in long runs, once for some samples; no cell is turned, but forward the kernels are.

   Forward, a thread has lines of its own, so many that their kernels of some samples stay near. Backward, all threads
   share some lines at a time: their kernels are mixed and add to the input's gradient, and their gradient, made of
   panels of both maps, is folded into those of alpha and E, which are taken as they lie, too. */

#include "pass.h"

/* Lines that are turned together. */
#define TURNED 4
/* Positions, and depths of a panel of kernels, that a product takes at a time: the first level holds the panel, the
   second the positions. */
#define POSITIONS 96
#define PANEL_DEPTHS 256
/* Positions over which kernels' gradients are summed at a time, and numbers of them that are folded at a time. */
#define SPAN 192
#define FOLDED 512
/* Of the gradient of alpha: mixtures and cells whose sums stay in registers. */
#define DOT_ROWS 4
#define DOT_CELLS 3

/* Numbers between the cells of a block; neighbours share no set of the cache, here and below. */
static index_t block_step(const Pass *p) { return p->block_depths + LANES; }

/* Mix a run of numbers of the kernels of samples, of which so many columns are a line: number d of line l to
   to[l to_line + d / LANES to_panel + d % LANES]. */
static void mix(const Pass *p, index_t number, index_t numbers, index_t line, index_t columns, index_t first,
                index_t samples, float *block, float *to, index_t to_row, index_t to_line, index_t to_panel) {
    index_t rows = samples * p->rows, step = block_step(p);
    const float *alpha = p->alpha + first * p->rows * p->cells;
    for (index_t at = number; at < number + numbers; at += p->block_depths) {
        index_t count = smaller(p->block_depths, number + numbers - at);
        const float *cell = p->cell + line * columns + at, *next = cell + p->block_depths;
        /* Cells are far apart: no hardware foresees the next one's run, nor, below, the next run of them all. */
        for (index_t j = 0; j < p->cells; j++, cell += p->cell_step) {
            const float *ahead = cell + (j + AHEAD < p->cells ? AHEAD * p->cell_step : 0);
            for (index_t i = 0; i < count; i += LANES) {
                for (index_t e = 0; e < LANES; e += 16) __builtin_prefetch(ahead + i + e);
                STORE(block + j * step + i, LOAD(cell + i));
                STORE(block + j * step + i + WIDTH, LOAD(cell + i + WIDTH));
            }
        }
        for (index_t i = 0; i < count; i += LANES) {
            index_t l = (at + i) / columns, d = (at + i) % columns;
            if (at + p->block_depths < number + numbers)
                for (index_t j = 0; j < p->cells; j++)
                    for (index_t e = 0; e < LANES; e += 16) __builtin_prefetch(next + j * p->cell_step + i + e, 0, 2);
            product(rows, 2, p->cells, alpha, p->cells, 1, block + i, step, to + l * to_line + d / LANES * to_panel,
                    to_row, 0);
        }
    }
}

/* Forward. */

/* The memory of one thread. */
typedef struct {
    float *block, *lying, *kernels, *out;
} Memory;

static index_t lying_step(const Pass *p) { return TURNED * p->depths + LANES; }
static index_t channels(const Pass *p) { return p->depths * p->depth_groups; }

/* Kernels of some lines, [sample, group of lines][panel][column of all groups][LANES lines]. */
static index_t panels(const Pass *p) { return pieces(p->lines, LANES); }
static index_t kernel_step(const Pass *p) { return panels(p) * channels(p) * LANES + LANES; }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    m->block = at, at += p->cells * block_step(p);
    m->lying = at, at += p->mixed_samples * p->rows * lying_step(p);
    m->kernels = at, at += p->mixed_samples * p->lane_groups * kernel_step(p);
    m->out = at, at += p->lane_groups * panels(p) * POSITIONS * LANES;
    return padded(at - start);
}

index_t kw_mix_rows_memory(const Pass *p) { return p->threads * lay_out(p, NULL, &(Memory){0}); }

/* Mix some lines of the kernels of samples, and turn them. */
static void mix_panels(const Pass *p, index_t line, index_t lines, index_t first, index_t samples, const Memory *m) {
    if (lines % LANES) memset(m->kernels, 0, samples * p->lane_groups * kernel_step(p) * sizeof(float));
    for (index_t l = 0; l < lines; l += TURNED) {
        index_t count = smaller(TURNED, lines - l);
        mix(p, 0, count * p->depths, line + l, p->depths, first, samples, m->block, m->lying, lying_step(p), p->depths,
            LANES);
        for (index_t r = 0; r < samples * p->rows; r++) {
            index_t group = r / p->depth_groups, panel = l / LANES * channels(p) + r % p->depth_groups * p->depths;
            arrange(m->lying + r * lying_step(p), 1, p->depths,
                    m->kernels + group * kernel_step(p) + panel * LANES + l % LANES, LANES, p->depths, count);
        }
    }
}

/* Write some positions of some lines of one group, finished where there is an epilogue. */
static void write_positions(const Pass *p, index_t sample, index_t channel, index_t lines, index_t from, index_t count,
                            const float *out) {
    Map map = p->out;
    Epilogue epilogue = p->epilogue;
    map.data += from * map.position, map.positions = count;
    if (epilogue.added.data) epilogue.added.data += from * epilogue.added.position;
    write_rows(&map, &epilogue, sample, channel, lines, LANES, out);
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
                write_positions(p, sample, g * p->lanes + line + l, smaller(LANES, lines - l), from, count,
                                m->out + (g * panels(p) + l / LANES) * POSITIONS * LANES);
    }
}

/* Some lines of a cell, for samples first to last of the batch. */
static void run_lines(const Pass *p, index_t line, index_t lines, index_t first, index_t last, const Memory *m) {
    for (index_t b = first; b < last; b += p->mixed_samples) {
        index_t samples = smaller(p->mixed_samples, last - b);
        mix_panels(p, line, lines, b, samples, m);
        for (index_t s = 0; s < samples; s++)
            apply(p, line, lines, b + s, m->kernels + s * p->lane_groups * kernel_step(p), m);
    }
}

void kw_mix_rows(const Pass *p) {
    index_t memory = lay_out(p, NULL, &(Memory){0}), blocks = pieces(p->lanes, p->lines), items = blocks * p->parts;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Memory m;
        lay_out(p, p->memory + thread * memory, &m);
        for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
            index_t line = i / p->parts * p->lines, part = i % p->parts;
            index_t from = p->batch * part / p->parts, to = p->batch * (part + 1) / p->parts;
            if (from < to) run_lines(p, line, smaller(p->lines, p->lanes - line), from, to, &m);
        }
    }
}

/* Backward: lanes are columns, depths lines. */

/* The memory that all threads share, and, from `own` on, that of each: blocks and sums of dot products. */
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
static index_t own_size(const Pass *p) { return padded(p->cells * block_step(p)) + padded(sums_size(p)); }

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
    return m->own + thread * own_size(p) + padded(p->cells * block_step(p));
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

/* The lines of samples, [sample, group][position][line], and their kernels. */
static void read_lines(const Pass *p, const Part *k, const Shared *m) {
    const Map *map = &p->source;
    index_t numbers = k->lines * p->lanes, runs = pieces(numbers, p->block_depths), maps = k->samples * p->depth_groups;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        index_t from = runs * thread / p->threads * p->block_depths;
        index_t to = smaller(runs * (thread + 1) / p->threads * p->block_depths, numbers);
        if (p->out.data)
            mix(p, from, to - from, k->line, p->lanes, k->first, k->samples, m->own + thread * own_size(p), m->kernels,
                part_step(p), LANES, LANES * k->lines);
        for (index_t i = maps * thread / p->threads; i < maps * (thread + 1) / p->threads; i++) {
            index_t sample = k->first + i / p->depth_groups, channel = i % p->depth_groups * p->depths + k->line;
            arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel,
                    m->source + i * p->source_positions * source_step(p), source_step(p), p->source_positions,
                    k->lines);
        }
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

/* Both, shared out. */
static void apply_part(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(p->source_positions, POSITIONS), panels = p->lane_groups * p->lanes / LANES;
    index_t of_input = p->out.data ? k->samples * blocks : 0, of_kernels = p->other.data ? k->samples * panels : 0;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        for (index_t i = of_input * thread / p->threads; i < of_input * (thread + 1) / p->threads; i++) {
            index_t from = p->source_positions * (i % blocks) / blocks;
            add_to_input(p, k, i / blocks, from, p->source_positions * (i % blocks + 1) / blocks - from, m);
        }
        index_t first = of_kernels * thread / p->threads, last = of_kernels * (thread + 1) / p->threads;
        for (index_t s = first / panels; s * panels < last; s++)
            differentiate(p, k, s, larger(first - s * panels, 0), smaller(last - s * panels, panels), m);
    }
}

/* sums[r][j] += a[r] * b[j], number by number, for some mixtures and cells. */
static void dot(index_t numbers, const float *const *a, const float *const *b, index_t ahead, float *sums,
                index_t row) {
    vector sum[DOT_ROWS][DOT_CELLS];
    const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *b0 = b[0], *b1 = b[1], *b2 = b[2];
    for (int r = 0; r < DOT_ROWS; r++)
        for (int j = 0; j < DOT_CELLS; j++) sum[r][j] = (vector){0};
    for (index_t d = 0; d < numbers; d += WIDTH) {
        vector c0 = LOAD(b0 + d), c1 = LOAD(b1 + d), c2 = LOAD(b2 + d), v = LOAD(a0 + d);
        if (ahead && d % 16 == 0) {
            __builtin_prefetch(b0 + d + ahead);
            __builtin_prefetch(b1 + d + ahead);
            __builtin_prefetch(b2 + d + ahead);
        }
        sum[0][0] += v * c0, sum[0][1] += v * c1, sum[0][2] += v * c2, v = LOAD(a1 + d);
        sum[1][0] += v * c0, sum[1][1] += v * c1, sum[1][2] += v * c2, v = LOAD(a2 + d);
        sum[2][0] += v * c0, sum[2][1] += v * c1, sum[2][2] += v * c2, v = LOAD(a3 + d);
        sum[3][0] += v * c0, sum[3][1] += v * c1, sum[3][2] += v * c2;
    }
    for (int r = 0; r < DOT_ROWS; r++)
        for (int j = 0; j < DOT_CELLS; j++) {
            float *to = sums + r * row + j * WIDTH;
            STORE(to, LOAD(to) + sum[r][j]);
        }
}

/* From the gradient of a run of numbers of kernels, its part of that of alpha. */
static void fold_into_alpha(const Pass *p, index_t numbers, index_t rows, const float *gradient, const float *cell,
                            float *sums) {
    for (index_t j = 0; j < p->cells; j += DOT_CELLS)
        for (index_t r = 0; r < rows; r += DOT_ROWS) {
            const float *a[DOT_ROWS], *b[DOT_CELLS];
            for (index_t i = 0; i < DOT_ROWS; i++) a[i] = gradient + smaller(r + i, rows - 1) * part_step(p);
            for (index_t i = 0; i < DOT_CELLS; i++) b[i] = cell + smaller(j + i, p->cells - 1) * p->cell_step;
            index_t ahead = r == 0 && j + 2 * DOT_CELLS <= p->cells ? DOT_CELLS * p->cell_step : 0;
            dot(numbers, a, b, ahead, sums + r * sums_row(p) + j * WIDTH, sums_row(p));
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

static void fold(const Pass *p, const Part *k, const Shared *m, int add) {
    index_t rows = k->samples * p->rows, numbers = k->lines * p->lanes, runs = pieces(numbers, FOLDED);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = runs * thread / p->threads; i < runs * (thread + 1) / p->threads; i++) {
            index_t from = i * FOLDED, count = smaller(FOLDED, numbers - from), place = k->line * p->lanes + from;
            if (p->alpha_gradient)
                fold_into_alpha(p, count, rows, m->gradient + from, p->cell + place, sums_of(p, m, thread));
            if (p->cell_gradient)
                fold_into_cells(p, count, rows, m->gradient + from, p->alpha + k->first * p->rows * p->cells,
                                p->cell_gradient + place, add);
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
            apply_part(p, &k, &m);
            if (p->other.data) fold(p, &k, &m, p->adds || b > 0);
        }
        if (p->alpha_gradient) add_up_sums(p, b, k.samples, &m);
    }
}
