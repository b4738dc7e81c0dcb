/* A depthwise convolution of maps whose channels come first: one channel at a time, with positions along the vectors.

   Some lines of a channel are copied into the near caches, with zeros around each, and followed by a line of zeros for
   kernel lines that read nothing. With a stride of 2, a line is stored as its even positions, then its odd ones. A tile
   is several lines by several vectors, PLANE_SUMS sums at most: so many hide the latency of one, and all use each
   number of the kernel that is loaded. */

#ifndef KW_PLANES_H
#define KW_PLANES_H

#include "pass.h"

/* Sums of a tile at most: lines by vectors or, for the kernel's gradient, lines by taps. */
#define PLANE_SUMS 8
#define EACH_LINE(CASE) CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8)
#define EACH_LINES(CASE) CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(4, 1) CASE(4, 2) CASE(8, 1)
#define EACH_TAPS(CASE, S) CASE(1, S) CASE(2, S) CASE(3, S) CASE(4, S) CASE(5, S) CASE(6, S) CASE(7, S) CASE(8, S)
/* Numbers of a channel's lines that are read together, and of those that are written; lines of a single strip may have
   more. */
#define PLANE 16384
/* Positions of a line from which on this is faster than channels side by side: LEAST_POSITIONS, but LONG_LINE_POSITIONS
   for kernels of more than SHORT_LINE taps a line. */
#define LEAST_POSITIONS (3 * WIDTH)
#define SHORT_LINE 5
#define LONG_LINE_POSITIONS 48

/* How copies of a channel's lines are laid out. */
typedef struct {
    index_t split;      /* the stride, 1 or 2: a line is so many runs, each of every split-th position */
    index_t half, line; /* numbers of such a run, and of a line */
    index_t held;       /* the most lines that are read together */
    index_t out;        /* numbers of a line of the output or of its gradient, in whole vectors */
    index_t most;       /* the most such lines together */
} Plane;

static inline Plane plane_of(const Walk *w, const Map *from) {
    Plane k = {.split = w->phase->read_step};
    k.half = pieces(w->room, k.split) + WIDTH, k.line = k.split * k.half;
    k.out = w->phases * pieces(pieces(w->out, w->phases), WIDTH) * WIDTH;
    k.held = larger(w->held, smaller(PLANE / k.line, from->positions / w->source));
    k.most = larger(w->strip, smaller(PLANE / k.out, w->lines));
    return k;
}

/* Whether a walk is computed by planes: positions contiguous, both strides at most 2, lines long enough. */
static inline int by_planes(const Walk *w, const Map *from, const Map *to) {
    if (from->position != 1 || to->position != 1 || w->phases > 2) return 0;
    if (smaller(w->out, w->source) < (w->taps > SHORT_LINE ? LONG_LINE_POSITIONS : LEAST_POSITIONS)) return 0;
    for (const Phase *f = w->phase; f < w->phase + w->phases; f++)
        if (f->read_step > 2 || f->read_step != w->phase->read_step || f->step != w->phases) return 0;
    return 1;
}

/* Numbers of the lines that are read, including that of zeros. */
static inline index_t plane_size(const Plane *k) { return (k->held + 1) * k->line; }

/* Copy WIDTH numbers or more; the last vector overlaps the one before. */
INLINE void copy_line(const float *from, float *to, index_t count) {
    for (index_t i = 0; i + WIDTH <= count; i += WIDTH) STORE(to + i, LOAD(from + i));
    STORE(to + count - WIDTH, LOAD(from + count - WIDTH));
}

/* to[i % 2 * run + i / 2] = from[i]. */
static inline void split_line(const float *from, index_t count, index_t run, float *to) {
    for (index_t i = 0; i < count / 2; i++) to[i] = from[2 * i], to[run + i] = from[2 * i + 1];
    if (count % 2) to[count / 2] = from[count - 1];
}

/* Copy contiguous lines of one channel, each behind its zeros. */
static inline void read_plane(const Walk *w, const Plane *k, const float *from, index_t lines, float *to) {
    for (to += w->before / k->split; lines > 0; lines--, from += w->source, to += k->line) {
        if (k->split == 1)
            copy_line(from, to, w->source);
        else if (w->before % 2 == 0)
            split_line(from, w->source, k->half, to);
        else { /* the first position is an odd one, behind an odd number of zeros; the next begins a pair */
            to[k->half] = from[0];
            split_line(from + 1, w->source - 1, k->half, to + 1);
        }
    }
}

/* Where position `read` of a line, zeros included, is stored. */
INLINE index_t place_of(const int split, const Plane *k, index_t read) {
    return split == 1 ? read : (read & 1) * k->half + (read >> 1);
}

/* For each line of the kernel, where the lines are stored that lines of out read through it: the line of zeros if they
   read none. */
static inline void place_lines(const Walk *w, const Plane *k, index_t kernel_lines, index_t line, index_t lines,
                               index_t first, int32_t *place) {
    for (index_t t = 0; t < kernel_lines; t++, place += k->most)
        for (index_t l = 0; l < lines; l++) {
            int32_t read = w->reads[t * w->lines + line + l];
            place[l] = (read < 0 ? k->held : read - first) * k->line;
        }
}

/* One tile of out. `kernel` is the kernel's first tap; `tap` and `tap_line` are the steps to the next tap and to the
   next line of taps. */
INLINE void plane_tile(const int lines, const int vectors, const int split, index_t kernel_lines, const Phase *f,
                       const Plane *k, const int32_t *place, const float *source, const float *kernel, index_t tap,
                       index_t tap_line, float *out, index_t out_line) {
    vector sum[PLANE_SUMS];
    EACH_ROW(lines * vectors) sum[r] = (vector){0};
    kernel += f->tap * tap;
    for (index_t t = 0; t < kernel_lines; t++, place += k->most, kernel += tap_line) {
        const float *line[PLANE_SUMS], *number = kernel;
        EACH_ROW(lines) line[r] = source + place[r];
        for (index_t i = 0, read = f->read; i < f->taps; i++, read += f->tap_read, number += f->tap_step * tap) {
            index_t at = place_of(split, k, read);
            float factor = *number;
            EACH_ROW(lines * vectors) sum[r] += LOAD(line[r / vectors] + at + r % vectors * WIDTH) * factor;
        }
    }
    EACH_ROW(lines * vectors) STORE(out + r / vectors * out_line + r % vectors * WIDTH, sum[r]);
}

/* All lines of out, at the same few vectors of a phase. */
static inline void plane_column(index_t vectors, index_t kernel_lines, const Phase *f, const Plane *k,
                                const int32_t *place, index_t lines, const float *source, const float *kernel,
                                index_t tap, index_t tap_line, float *out, index_t out_line) {
    index_t most = PLANE_SUMS / vectors;
    for (index_t l = 0, count; l < lines; l += count, place += count, out += count * out_line) {
        for (count = most; count > lines - l;) count /= 2;
        switch (32 * count + 2 * vectors + k->split - 1) {
#define CASE(L, V)                                                                                    \
    case 32 * L + 2 * V:                                                                              \
        plane_tile(L, V, 1, kernel_lines, f, k, place, source, kernel, tap, tap_line, out, out_line); \
        break;                                                                                        \
    case 32 * L + 2 * V + 1:                                                                          \
        plane_tile(L, V, 2, kernel_lines, f, k, place, source, kernel, tap, tap_line, out, out_line); \
        break;
            EACH_LINE(CASE) EACH_LINES(CASE)
#undef CASE
        }
    }
}

/* Compute some lines of one channel of out: straight into the map or, if two phases alternate along a line, into `own`,
   from which they are interleaved. */
static inline void convolve_plane(const Pass *p, const Plane *k, const int32_t *place, index_t lines,
                                  const float *source, const float *kernel, index_t tap, index_t tap_line, float *own,
                                  float *to) {
    const Walk *w = &p->walk;
    int direct = w->phases == 1;
    index_t step = direct ? w->out : k->out, run = k->out / w->phases, kernel_lines = p->taps / w->taps;
    float *rows = direct ? to : own;
    for (const Phase *f = w->phase; f < w->phase + w->phases; f++, rows += run) {
        index_t whole = (direct ? f->positions : run) / WIDTH, rest = direct ? f->positions % WIDTH : 0;
        for (index_t x = 0, vectors; x < whole; x += vectors) {
            vectors = smaller(whole - x, PLANE_SUMS);
            plane_column(vectors, kernel_lines, f, k, place, lines, source + x * WIDTH, kernel, tap, tap_line,
                         rows + x * WIDTH, step);
        }
        if (rest) /* the last vector, which overlaps the one before */
            plane_column(1, kernel_lines, f, k, place, lines, source + f->positions - WIDTH, kernel, tap, tap_line,
                         rows + f->positions - WIDTH, step);
    }
    for (; !direct && lines > 0; lines--, own += k->out, to += w->out) {
        for (index_t i = 0; i < w->out / 2; i++) to[2 * i] = own[i], to[2 * i + 1] = own[run + i];
        if (w->out % 2) to[w->out - 1] = own[w->out / 2];
    }
}

/* The sum of a vector's numbers. */
INLINE float total_of(const vector *v) {
    const float *at = (const float *)v;
    four sum = FOUR((float *)at);
    for (int i = 4; i < WIDTH; i += 4) sum += FOUR((float *)at + i);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The gradient of neighbouring taps of one line of the kernel, summed over lines; `turns` lines at a time have sums of
   their own. */
INLINE void plane_sums(const int taps, const int turns, const int split, const Phase *f, const Plane *k,
                       const int32_t *place, index_t lines, const float *other, const float *factor, index_t tap,
                       float *c, index_t c_tap, int add) {
    index_t at[PLANE_SUMS];
    vector sum[PLANE_SUMS];
    EACH_ROW(taps) at[r] = place_of(split, k, f->read + (tap + r) * f->tap_read);
    EACH_ROW(taps * turns) sum[r] = (vector){0};
    for (index_t l = 0; l + turns <= lines; l += turns, place += turns, factor += turns * k->out)
        for (index_t x = 0; x < k->out; x += WIDTH)
            for (int u = 0; u < turns; u++) {
                const float *line = other + place[u] + x;
                vector b = LOAD(factor + u * k->out + x);
                EACH_ROW(taps) sum[u * taps + r] += LOAD(line + at[r]) * b;
            }
    for (int u = 1; u < turns; u++) EACH_ROW(taps) sum[r] += sum[u * taps + r];
    EACH_ROW(taps) c[r * c_tap] = total_of(&sum[r]) + (add ? c[r * c_tap] : 0);
}

/* The gradient of all taps of one channel's kernel, from some lines of the input, `other`, and of the output's
   gradient, `factor`. */
static inline void differentiate_plane(const Pass *p, const Plane *k, const int32_t *place, index_t lines,
                                       const float *other, const float *factor, float *kernel, index_t tap,
                                       index_t tap_line, int add) {
    const Walk *w = &p->kernel_walk;
    for (index_t t = 0; t < p->taps / w->taps; t++, kernel += tap_line, place += k->most)
        for (index_t tiles = pieces(w->taps, PLANE_SUMS), i = 0, taps; tiles > 0; tiles--, i += taps) {
            float *c = kernel + i * tap;
            taps = (w->taps - i) / tiles;
            switch (2 * taps + k->split - 1) {
#define SUMS(N, TURNS, S, from, count, added) \
    plane_sums(N, TURNS, S, w->phase, k, place + from, count, other, factor + (from) * k->out, i, c, tap, added)
#define CASE(N, S)                                                  \
    case 2 * N + S - 1: {                                           \
        index_t even = lines / (PLANE_SUMS / N) * (PLANE_SUMS / N); \
        SUMS(N, PLANE_SUMS / N, S, 0, even, add);                   \
        if (even < lines) SUMS(N, 1, S, even, lines - even, 1);     \
        break;                                                      \
    }
                EACH_TAPS(CASE, 1) EACH_TAPS(CASE, 2)
#undef CASE
#undef SUMS
            }
        }
}

#endif
