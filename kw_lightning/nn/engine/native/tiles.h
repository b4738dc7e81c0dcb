/* What all passes are made of: a small product of matrices in registers, and copies that transpose blocks.

   A vector has WIDTH numbers, a block LANES = 2 WIDTH columns. All sums of a product stay in registers: it takes at
   most ROWS rows of scalars against two vectors, or NARROW_ROWS against one; or LONG_ROWS against two if the rows are
   no scalars, which take a register, but vectors read from memory. */

#ifndef KW_TILES_H
#define KW_TILES_H

#include <stdint.h>
#include <string.h>

#ifndef WIDTH
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#endif
#define LANES (2 * WIDTH)
/* A product is compiled once for each number of rows: its sums are only in registers if this number is a constant. */
#if WIDTH == 16
#define ROWS 12
#define NARROW_ROWS 12
#define EACH_COUNT(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#define EACH_NARROW_COUNT(CASE) EACH_COUNT(CASE)
#define LONG_ROWS 12
#define EACH_LONG_COUNT(CASE) EACH_COUNT(CASE)
#else
#define ROWS 6
#define NARROW_ROWS 8
#define EACH_COUNT(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#define EACH_NARROW_COUNT(CASE) EACH_COUNT(CASE) CASE(7) CASE(8)
#define LONG_ROWS 7
#define EACH_LONG_COUNT(CASE) EACH_COUNT(CASE) CASE(7)
#endif
#define MOST_ROWS(vectors) ((vectors) > 1 ? ROWS : NARROW_ROWS)

#define SQUARE 64

typedef int64_t index_t;
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EACH_ROW(rows) _Pragma("GCC unroll 12") for (int r = 0; r < (rows); r++)

/* Macros, not functions: a vector type wider than the machine's must not cross a call. */
#define LOAD(from) (*(const vector *)(from))
#define FOUR(at) (*(four *)(at))
#define STORE(to, value) (*(vector *)(to) = (value))

/* Keep a vector in its register: compilers would load it again for every product. */
#if defined(__AVX512F__) && WIDTH == 16
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX__) && WIDTH == 8
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v)
#endif

INLINE index_t smaller(index_t a, index_t b) { return a < b ? a : b; }
INLINE index_t larger(index_t a, index_t b) { return a > b ? a : b; }
INLINE index_t pieces(index_t n, index_t size) { return (n + size - 1) / size; }
INLINE index_t padded(index_t n) { return pieces(n, LANES) * LANES; }

/* Prefetch contiguous numbers, 16 a line of the cache. */
INLINE void fetch(const float *from, index_t numbers) {
    for (index_t i = 0; i < numbers; i += 16) __builtin_prefetch(from + i);
}

/* c[r] = or += sum over k of a[r, k] * b[k], for rows of one or two vectors. */
INLINE void product_rows(const int rows, const int vectors, index_t length, const float *a, index_t a_row,
                         index_t a_step, const float *b, index_t b_step, float *c, index_t c_row, int add) {
    vector sum[NARROW_ROWS][2];
    EACH_ROW(rows) {
        sum[r][0] = add ? LOAD(c + r * c_row) : (vector){0};
        sum[r][1] = add && vectors > 1 ? LOAD(c + r * c_row + WIDTH) : (vector){0};
    }
    for (index_t k = 0; k < length; k++, a += a_step, b += b_step) {
        vector b0 = LOAD(b), b1 = vectors > 1 ? LOAD(b + WIDTH) : b0;
        if (rows < ROWS) { /* with all rows, compilers keep them */
            KEEP(b0);
            KEEP(b1);
        }
        EACH_ROW(rows) {
            sum[r][0] += a[r * a_row] * b0;
            if (vectors > 1) sum[r][1] += a[r * a_row] * b1;
        }
    }
    EACH_ROW(rows) {
        STORE(c + r * c_row, sum[r][0]);
        if (vectors > 1) STORE(c + r * c_row + WIDTH, sum[r][1]);
    }
}

/* The same for any number of rows, cut evenly into tiles. */
static inline void product(index_t rows, int vectors, index_t length, const float *a, index_t a_row, index_t a_step,
                           const float *b, index_t b_step, float *c, index_t c_row, int add) {
    for (index_t tiles = pieces(rows, MOST_ROWS(vectors)), first = 0; tiles > 0; tiles--) {
        index_t count = (rows - first) / tiles;
        const float *at = a + first * a_row;
        float *to = c + first * c_row;
        first += count;
        switch (2 * count + (vectors > 1)) {
#define CASE(N)                                                                   \
    case 2 * N:                                                                   \
        product_rows(N, 1, length, at, a_row, a_step, b, b_step, to, c_row, add); \
        break;
            EACH_NARROW_COUNT(CASE)
#undef CASE
#define CASE(N)                                                                   \
    case 2 * N + 1:                                                               \
        product_rows(N, 2, length, at, a_row, a_step, b, b_step, to, c_row, add); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_indices __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_indices){__VA_ARGS__})
#endif

/* to[i * to_row + j] = from[j * from_row + i], 4 by 4. */
INLINE void turn_four(const float *from, index_t from_row, float *to, index_t to_row) {
    four a = FOUR(from), b = FOUR(from + from_row), c = FOUR(from + 2 * from_row), d = FOUR(from + 3 * from_row);
    four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    FOUR(to) = SHUFFLE(ab, cd, 0, 1, 4, 5);
    FOUR(to + to_row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
    FOUR(to + 2 * to_row) = SHUFFLE(ab, cd, 0, 1, 4, 5);
    FOUR(to + 3 * to_row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
}

#if defined(__AVX512F__) && WIDTH == 16
/* Transpose a square of whole vectors: step b exchanges bit b of each number's column with bit b of its row, that is,
   halves, quarters and so on change places. Only AVX-512 does one step of two vectors in two instructions. */
#define SIDE 16
#define FIRST(b, c) ((c) >> (b) & 1 ? 16 + ((c) ^ 1 << (b)) : (c))
#define SECOND(b, c) ((c) >> (b) & 1 ? 16 + (c) : (c) ^ 1 << (b))
#define COLUMNS(OF, b)                                                                                             \
    OF(b, 0), OF(b, 1), OF(b, 2), OF(b, 3), OF(b, 4), OF(b, 5), OF(b, 6), OF(b, 7), OF(b, 8), OF(b, 9), OF(b, 10), \
        OF(b, 11), OF(b, 12), OF(b, 13), OF(b, 14), OF(b, 15)
#ifdef __clang__
#define EXCHANGED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t indices __attribute__((vector_size(64)));
#define EXCHANGED(x, y, ...) __builtin_shuffle(x, y, (indices){__VA_ARGS__})
#endif
#define EXCHANGE(b)                                                                                       \
    _Pragma("GCC unroll 8") for (int k = 0; k < SIDE / 2; k++) {                                          \
        const int i = (k >> (b) << ((b) + 1)) | (k & ((1 << (b)) - 1));                                   \
        vector x = v[i], y = v[i | 1 << (b)];                                                             \
        v[i] = EXCHANGED(x, y, COLUMNS(FIRST, b)), v[i | 1 << (b)] = EXCHANGED(x, y, COLUMNS(SECOND, b)); \
    }                                                                                                     \
    ((void)0)

/* to[i * to_row + j] = from[j * from_row + i]. */
INLINE void turn_square(const float *from, index_t from_row, float *to, index_t to_row) {
    vector v[SIDE];
    _Pragma("GCC unroll 16") for (int i = 0; i < SIDE; i++) v[i] = LOAD(from + i * from_row);
    EXCHANGE(0);
    EXCHANGE(1);
    EXCHANGE(2);
    EXCHANGE(3);
    _Pragma("GCC unroll 16") for (int i = 0; i < SIDE; i++) STORE(to + i * to_row, v[i]);
}
#else
#define SIDE 4
#define turn_square turn_four
#endif

/* From so many numbers on, the library's memcpy is faster than vectors here. */
#define CALLED 128

INLINE void copy(const float *from, float *to, index_t count) {
    index_t i = 0;
    if (count >= CALLED) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    for (; i + WIDTH <= count; i += WIDTH) STORE(to + i, LOAD(from + i));
    for (; i < count; i++) to[i] = from[i];
}

/* to[i * to_row + j] = from[i * from_i + j * from_j] for i < rows, j < columns; fast where one step is 1. */
static inline void arrange(const float *from, index_t from_i, index_t from_j, float *to, index_t to_row, index_t rows,
                           index_t columns) {
    if (from_j == 1 && columns == LANES) { /* in registers, without a call for each */
        for (index_t i = 0; i < rows; i++, from += from_i, to += to_row) {
            vector a = LOAD(from), b = LOAD(from + WIDTH);
            STORE(to, a);
            STORE(to + WIDTH, b);
        }
        return;
    }
    if (from_j == 1) {
        for (index_t i = 0; i < rows; i++) copy(from + i * from_i, to + i * to_row, columns);
        return;
    }
    if (from_i != 1 || rows < 4 || columns < 4) {
        for (index_t i = 0; i < rows; i++)
            for (index_t j = 0; j < columns; j++) to[i * to_row + j] = from[i * from_i + j * from_j];
        return;
    }
    /* By squares of SQUARE numbers a side, so that both sides stay in the first-level cache and touch few pages. The
       last `side` rows and columns are always transposed together, some of them for the second time. */
    const index_t side = rows < SIDE || columns < SIDE ? 4 : SIDE;
    for (index_t top = 0; top < rows; top += SQUARE)
        for (index_t left = 0; left < columns; left += SQUARE)
            for (index_t y = left; y < smaller(left + SQUARE, columns); y += side)
                for (index_t x = top; x < smaller(top + SQUARE, rows); x += side) {
                    index_t i = smaller(x, rows - side), j = smaller(y, columns - side);
                    if (side == SIDE)
                        turn_square(from + i + j * from_j, from_j, to + i * to_row + j, to_row);
                    else
                        turn_four(from + i + j * from_j, from_j, to + i * to_row + j, to_row);
                }
}

#endif
