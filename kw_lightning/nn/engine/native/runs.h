/* A run is the same range of numbers of every cell, copied as they lie in E: one is used from the cache while the next
   is read.

   Cells are far apart, so the hardware does not prefetch the next one's numbers, and many prefetches at once would fill
   the queue of cache misses, in which the products' own reads then wait. So the products read the next run, a few
   numbers at a time, and prefetch a few cells ahead: memory and arithmetic are at work together. */

#ifndef KW_RUNS_H
#define KW_RUNS_H

#include "pass.h"

/* The numbers of every cell from `place` to `end`. */
typedef struct {
    index_t place, end;
} Span;

/* The run in use, and memory for the next. */
typedef struct {
    float *block, *spare; /* [cell][number], block_step numbers from cell to cell */
    Span held;            /* what `block` holds */
} Runs;

/* How far a run has been read: of `cell`, the numbers before `at` are in `block`; `cells` are left, with this one. */
typedef struct {
    const float *cell;
    float *block;
    index_t at, numbers, cells;
    index_t cell_step, block_step;
    /* Numbers from what is read to what is prefetched: `ahead`, which becomes `behind` in the last `behind_cells`. */
    index_t ahead, behind, behind_cells;
} Reading;

/* Numbers from cell to cell of a block; padded, so that neighbours do not share a set of the cache. */
static inline index_t block_step(const Pass *p) { return p->block_depths + LANES; }
static inline index_t runs_size(const Pass *p) { return 2 * p->cells * block_step(p); }
static inline Runs runs_in(const Pass *p, float *memory) {
    return (Runs){memory, memory + p->cells * block_step(p), {0, 0}};
}

static inline int any(Span numbers) { return numbers.place < numbers.end; }

/* The first run of some numbers. */
static inline Span first_run(const Pass *p, Span numbers) {
    return (Span){numbers.place, smaller(numbers.place + p->block_depths, numbers.end)};
}

/* Start to read a run into `to`. The one after it probably begins `following` numbers further on: while the last cells
   are read, its first are prefetched. */
static inline Reading start_reading(const Pass *p, Span run, float *to, index_t following) {
    index_t numbers = run.end - run.place, most = smaller(AHEAD, p->cells);
    return (Reading){.cell = p->cell + run.place,
                     .block = to,
                     .numbers = numbers,
                     .cells = numbers > 0 ? p->cells : 0,
                     .cell_step = p->cell_step,
                     .block_step = block_step(p),
                     .ahead = most * p->cell_step,
                     .behind = following - (p->cells - most) * p->cell_step,
                     .behind_cells = most};
}

static __attribute__((noinline)) void go_on(Reading *r) {
    if (r->cells > 0) r->cells--;
    if (r->cells == 0) return;
    if (r->cells == r->behind_cells) r->ahead = r->behind;
    r->cell += r->cell_step, r->block += r->block_step, r->at = 0;
}

/* Read the next LANES numbers, if any are left. */
INLINE void read_on(Reading *r) {
    if (r->at == r->numbers) go_on(r);
    if (r->at == r->numbers) return;
    const float *from = r->cell + r->at;
    float *to = r->block + r->at;
    vector a = LOAD(from), b = LOAD(from + WIDTH);
    fetch(from + r->ahead, LANES);
    r->at += LANES;
    STORE(to, a);
    STORE(to + WIDTH, b);
}

static inline void finish_reading(Reading *r) {
    while (r->cells > 1 || r->at < r->numbers) read_on(r);
}

/* Make `block` hold a run: read it, unless it does already. */
static inline void take_run(const Pass *p, Runs *runs, Span run) {
    if (runs->held.place == run.place && runs->held.end == run.end) return;
    Reading reading = start_reading(p, run, runs->block, 0);
    finish_reading(&reading);
    runs->held = run;
}

/* Read what is left of the next run, and make it the one in use; stay if there is none. */
static inline void end_reading(Runs *runs, Reading *reading, Span next) {
    finish_reading(reading);
    if (!any(next)) return;
    float *block = runs->block;
    runs->block = runs->spare, runs->spare = block, runs->held = next;
}

/* product_rows of two vectors, which reads LANES numbers of the next run after every `terms` terms of its sums. */
INLINE void reading_rows(const int rows, index_t length, const float *a, index_t a_row, const float *b, index_t b_step,
                         float *c, index_t c_row, index_t next, index_t terms, Reading *reading) {
    vector sum[ROWS][2];
    EACH_ROW(rows) sum[r][0] = (vector){0}, sum[r][1] = (vector){0};
    EACH_ROW(rows) for (index_t i = 0; i < LANES; i += 16) __builtin_prefetch(c + r * c_row + next + i, 1);
    for (index_t k = 0; k < length;) {
        for (index_t end = smaller(k + terms, length); k < end; k++, a++, b += b_step) {
            vector b0 = LOAD(b), b1 = LOAD(b + WIDTH);
            if (rows < ROWS) {
                KEEP(b0);
                KEEP(b1);
            }
            EACH_ROW(rows) {
                sum[r][0] += a[r * a_row] * b0;
                sum[r][1] += a[r * a_row] * b1;
            }
        }
        read_on(reading);
    }
    EACH_ROW(rows) {
        STORE(c + r * c_row, sum[r][0]);
        STORE(c + r * c_row + WIDTH, sum[r][1]);
    }
}

/* c[r] = sum over cells j of alpha[r, j] * block[j], for rows of two vectors, while as much of the next run is read.
   The next call's place, c + next, is prefetched. */
static inline void mix_reading(const Pass *p, index_t rows, const float *alpha, const float *block, float *c,
                               index_t c_row, index_t next, Reading *reading) {
    index_t tiles = pieces(rows, ROWS);
    for (index_t left = tiles, first = 0; left > 0; left--) {
        index_t count = (rows - first) / left;
        const float *at = alpha + first * p->cells;
        float *to = c + first * c_row;
        first += count;
        switch (count) {
#define CASE(N)                                                                                         \
    case N:                                                                                             \
        reading_rows(N, p->cells, at, p->cells, block, block_step(p), to, c_row, next, tiles, reading); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

/* Mix the run in use into the kernels of some samples, while the next one is read. A line is `columns` numbers; number
   d of line l, counted from `line`, goes to to[l to_line + d / LANES to_panel + d % LANES]. */
static inline void mix_run(const Pass *p, const Runs *runs, index_t line, index_t columns, index_t first,
                           index_t samples, float *to, index_t to_row, index_t to_line, index_t to_panel,
                           Reading *reading) {
    index_t start = runs->held.place - line * columns, numbers = runs->held.end - runs->held.place;
    const float *alpha = p->alpha + first * p->rows * p->cells;
    for (index_t i = 0, l = start / columns, d = start % columns; i < numbers; i += LANES, d += LANES) {
        if (d == columns) d = 0, l++;
        mix_reading(p, samples * p->rows, alpha, runs->block + i, to + l * to_line + d / LANES * to_panel, to_row,
                    to_panel, reading);
    }
}

#endif
