/* Mix parts of the kernels of some samples, or fold their gradient into those of alpha and E, by runs of all cells
   (runs.h): every run is read once, as it lies. */

#ifndef KW_FOLDS_H
#define KW_FOLDS_H

#include "runs.h"

/* For alpha's gradient: mixtures and cells of which all products are summed in registers at once. */
#define DOT_ROWS 4
#define DOT_CELLS 3

/* Some lines of the kernels of some samples; a line is `columns` numbers of a cell. */
typedef struct {
    index_t first, samples;
    index_t line, lines, columns;
    index_t step;       /* from mixture to mixture, of the kernels and of their gradient, whose lines lie as in E */
    index_t line_step;  /* from line to line of the kernels */
    index_t panel_step; /* of the kernels, from LANES columns to the next */
    float *kernels, *gradient;
} Part;

/* Step from mixture to mixture of the sums of dot products; a sum is a vector, whose lanes are added up at the end. */
static inline index_t sums_row(const Pass *p) { return pieces(p->cells, DOT_CELLS) * DOT_CELLS * WIDTH; }
static inline index_t sums_size(const Pass *p) {
    return p->alpha_gradient ? pieces(p->mixed_samples * p->rows, DOT_ROWS) * DOT_ROWS * sums_row(p) : 0;
}

/* The memory of each thread: runs, and sums of dot products. */
static inline index_t folds_size(const Pass *p) { return runs_size(p) + padded(sums_size(p)); }
static inline float *sums_of(const Pass *p, float *folds, index_t thread) {
    return folds + thread * folds_size(p) + runs_size(p);
}

static inline void clear_sums(const Pass *p, float *folds) {
    for (index_t thread = 0; p->alpha_gradient && thread < p->threads; thread++)
        memset(sums_of(p, folds, thread), 0, sums_size(p) * sizeof(float));
}

/* sums[r][j] += a[r] * b[j] lane by lane, for DOT_ROWS mixtures and DOT_CELLS cells. */
static inline void dot(index_t numbers, const float *const *a, const float *const *b, float *sums, index_t row) {
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

/* What of a few cells' gradient is prefetched next, one line of the cache at a time, before it is added to. */
typedef struct {
    const float *at, *end;
    index_t numbers, step;
} Bringing;

static inline void bring(Bringing *b, index_t lines) {
    for (; lines > 0; lines--) {
        __builtin_prefetch(b->at, 1);
        b->at += 16;
        if (b->at == b->end) b->at += b->step - b->numbers, b->end += b->step;
    }
}

/* Add what a run contributes to the gradient of alpha for a few cells; meanwhile these cells' own gradient, `to`, is
   prefetched. */
static inline void fold_into_alpha(const Pass *p, const Part *k, index_t numbers, index_t rows, const float *gradient,
                                   const float *block, index_t cells, float *sums, float *to) {
    Bringing bringing = {to, to + numbers, numbers, p->cell_step};
    index_t left = to ? cells * numbers / 16 : 0, calls = pieces(cells, DOT_CELLS) * pieces(rows, DOT_ROWS);
    index_t each = pieces(left, calls);
    for (index_t j = 0; j < cells; j += DOT_CELLS)
        for (index_t r = 0; r < rows; r += DOT_ROWS) {
            const float *a[DOT_ROWS], *b[DOT_CELLS];
            for (index_t i = 0; i < DOT_ROWS; i++) a[i] = gradient + smaller(r + i, rows - 1) * k->step;
            for (index_t i = 0; i < DOT_CELLS; i++) b[i] = block + smaller(j + i, cells - 1) * block_step(p);
            bring(&bringing, smaller(each, left));
            left -= smaller(each, left);
            dot(numbers, a, b, sums + r * sums_row(p) + j * WIDTH, sums_row(p));
        }
}

/* Fold a run of the kernels' gradient into those of alpha and E, a few cells at a time. */
static inline void fold_run(const Pass *p, const Part *k, Span run, const float *block, float *sums, int add) {
    index_t rows = k->samples * p->rows, numbers = run.end - run.place;
    const float *gradient = k->gradient + run.place - k->line * k->columns;
    const float *alpha = p->alpha + k->first * p->rows * p->cells;
    for (index_t j = 0; j < p->cells; j += ROWS) {
        index_t cells = smaller(ROWS, p->cells - j);
        float *to = p->cell_gradient ? p->cell_gradient + run.place + j * p->cell_step : NULL;
        if (p->alpha_gradient)
            fold_into_alpha(p, k, numbers, rows, gradient, block + j * block_step(p), cells, sums + j * WIDTH, to);
        for (index_t i = 0; to && i < numbers; i += LANES)
            product(cells, 2, rows, alpha + j, 1, p->cells, gradient + i, k->step, to + i, p->cell_step, add);
    }
}

/* Mix the kernels, fold their gradient, or both, one run of all cells after the other. */
static inline void each_run(const Pass *p, const Part *k, float *folds, int mixes, int differentiates, int add) {
    index_t numbers = k->lines * k->columns, start = k->line * k->columns, count = pieces(numbers, p->block_depths);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Runs runs = runs_in(p, folds + thread * folds_size(p));
        Span all = {start + count * thread / p->threads * p->block_depths,
                    start + smaller(count * (thread + 1) / p->threads * p->block_depths, numbers)};
        for (Span run = first_run(p, all), next; any(run); run = next) {
            next = first_run(p, (Span){run.end, all.end});
            take_run(p, &runs, run);
            Reading reading = start_reading(p, next, runs.spare, p->block_depths);
            if (mixes)
                mix_run(p, &runs, k->line, k->columns, k->first, k->samples, k->kernels, k->step, k->line_step,
                        k->panel_step, &reading);
            if (differentiates) fold_run(p, k, run, runs.block, sums_of(p, folds, thread), add);
            end_reading(&runs, &reading, next);
        }
    }
}

/* The gradient of alpha of some samples, from the sums of all threads. */
static inline void add_up_sums(const Pass *p, const Part *k, float *folds) {
    if (!p->alpha_gradient) return;
    float *to = p->alpha_gradient + k->first * p->rows * padded(p->cells);
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t r = 0; r < k->samples * p->rows; r++)
            for (index_t j = 0; j < p->cells; j++) {
                const float *sum = sums_of(p, folds, thread) + r * sums_row(p) + j * WIDTH;
                for (int i = 0; i < WIDTH; i++) to[r * padded(p->cells) + j] += sum[i];
            }
}

/* c[r] = or += sum over groups g and k of a[g, r, k] * b[g, k], for rows of one or two vectors: product_rows over
   several groups, whose sums are loaded and stored once. */
INLINE void group_rows(const int rows, const int vectors, index_t groups, index_t length, const float *a, index_t a_row,
                       index_t a_step, index_t a_group, const float *b, index_t b_group, float *c, index_t c_row,
                       int add) {
    vector sum[NARROW_ROWS][2];
    EACH_ROW(rows) {
        sum[r][0] = add ? LOAD(c + r * c_row) : (vector){0};
        sum[r][1] = add && vectors > 1 ? LOAD(c + r * c_row + WIDTH) : (vector){0};
    }
    for (index_t g = 0; g < groups; g++) {
        const float *from = a + g * a_group, *at = b + g * b_group;
        for (index_t k = 0; k < length; k++, from += a_step, at += LANES) {
            vector b0 = LOAD(at), b1 = vectors > 1 ? LOAD(at + WIDTH) : b0;
            EACH_ROW(rows) {
                sum[r][0] += from[r * a_row] * b0;
                if (vectors > 1) sum[r][1] += from[r * a_row] * b1;
            }
        }
    }
    EACH_ROW(rows) {
        STORE(c + r * c_row, sum[r][0]);
        if (vectors > 1) STORE(c + r * c_row + WIDTH, sum[r][1]);
    }
}

/* The same for any number of rows, cut evenly. */
static inline void product_of_groups(index_t rows, int vectors, index_t groups, index_t length, const float *a,
                                     index_t a_row, index_t a_step, index_t a_group, const float *b, index_t b_group,
                                     float *c, index_t c_row, int add) {
    for (index_t tiles = pieces(rows, MOST_ROWS(vectors)), first = 0; tiles > 0; tiles--) {
        index_t count = (rows - first) / tiles;
        const float *at = a + first * a_row;
        float *to = c + first * c_row;
        first += count;
        switch (2 * count + (vectors > 1)) {
#define CASE(N)                                                                                   \
    case 2 * N:                                                                                   \
        group_rows(N, 1, groups, length, at, a_row, a_step, a_group, b, b_group, to, c_row, add); \
        break;
            EACH_NARROW_COUNT(CASE)
#undef CASE
#define CASE(N)                                                                                   \
    case 2 * N + 1:                                                                               \
        group_rows(N, 2, groups, length, at, a_row, a_step, a_group, b, b_group, to, c_row, add); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

#endif
