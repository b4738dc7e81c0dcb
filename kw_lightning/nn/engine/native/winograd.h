/* Winograd's form F(2, 3) of convolutions with three kernel positions a dimension: the transforms of a map's windows
   and of kernels, and back. native/positions.py explains the form. */

#ifndef KW_WINOGRAD_H
#define KW_WINOGRAD_H

#include "tiles.h"

#define MOST_DIMENSIONS 3
#define WINDOW 64 /* transformed positions of a window: four in each of MOST_DIMENSIONS */
#define KERNEL 3  /* positions of a kernel in each dimension */

/* How windows lie on a map: each begins two positions after the one before. */
typedef struct {
    int32_t dimensions;             /* of the map; 0 for no windows: positions are not transformed */
    int32_t reach;                  /* positions of a window in a dimension: 4 of an input, 2 of an output */
    int32_t size[MOST_DIMENSIONS];  /* of the map */
    int32_t count[MOST_DIMENSIONS]; /* windows along each dimension */
    int32_t first[MOST_DIMENSIONS]; /* where the first window begins; negative where the map is padded */
} Windows;

/* One window: the position of the map where it begins, and the range of its places in each dimension that lie on the
   map. */
typedef struct {
    index_t base;
    int from[MOST_DIMENSIONS], to[MOST_DIMENSIONS];
} Window;

INLINE index_t window_count(const Windows *w) {
    index_t count = 1;
    for (int d = 0; d < w->dimensions; d++) count *= w->count[d];
    return count;
}

INLINE Window window_at(const int dimensions, const Windows *w, index_t i) {
    Window found = {0};
    index_t step = 1;
    for (int d = dimensions - 1; d >= 0; d--) {
        int first = w->first[d] + (int)(i % w->count[d]) * 2;
        i /= w->count[d];
        found.base += first * step;
        found.from[d] = first < 0 ? -first : 0;
        found.to[d] = (int)smaller(w->size[d] - first, w->reach);
        step *= w->size[d];
    }
    return found;
}

/* The place along dimension d of a window's position e. */
#define PLACE(dimensions, e, d) ((e) >> 2 * ((dimensions) - 1 - (d)) & 3)

/* Whether a window's position e has a place below `limit` in dimensions d to `end`. */
INLINE int within(const int dimensions, const int e, const int d, const int end, const int limit) {
    int found = 1;
    for (int k = d; k < end; k++) found &= PLACE(dimensions, e, k) < limit;
    return found;
}

/* Whether a window's position e lies on the map, and how many positions after the window's first. */
INLINE int on_map(const int dimensions, const Windows *w, const Window *window, const int e, index_t *behind) {
    int found = 1;
    *behind = 0;
    for (int d = 0; d < dimensions; d++) {
        int place = PLACE(dimensions, e, d);
        found &= place >= window->from[d] && place < window->to[d];
        *behind = *behind * w->size[d] + place;
    }
    return found;
}

/* Transform one dimension in place, values being `step` apart: by `reach`, 4 inputs, V = Bt x; a kernel, U = G w; or
   the gradient of 2 outputs, A y. */
INLINE void transform_side(const int reach, const int step, vector *v) {
    vector a = v[0], b = v[step];
    if (reach == 2) {
        v[step] = a + b, v[2 * step] = a - b, v[3 * step] = -b;
        return;
    }
    vector c = v[2 * step];
    if (reach == KERNEL) {
        vector ends = (a + c) * 0.5f, half = b * 0.5f;
        v[step] = ends + half, v[2 * step] = ends - half, v[3 * step] = c;
        return;
    }
    vector d = v[3 * step];
    v[0] = a - c, v[step] = b + c, v[2 * step] = c - b, v[3 * step] = b - d;
}

/* The transposes: by `reach`, 2 outputs from the products, y = At m; the gradient of a kernel, Gt u; or a window's part
   of the gradient of 4 inputs, B m. */
INLINE void transform_side_back(const int reach, const int step, vector *v) {
    vector a = v[0], b = v[step], c = v[2 * step], d = v[3 * step];
    if (reach == 2) {
        v[0] = a + b + c, v[step] = b - c - d;
    } else if (reach == KERNEL) {
        vector half = (b + c) * 0.5f;
        v[0] = a + half, v[step] = (b - c) * 0.5f, v[2 * step] = half + d;
    } else {
        v[step] = b - c + d, v[2 * step] = b + c - a, v[3 * step] = -d;
    }
}

/* All dimensions of a window, one after the other. */
INLINE void transform_window(const int dimensions, const int reach, const int back, vector *v) {
    for (int d = 0; d < dimensions; d++) {
        const int step = 1 << 2 * (dimensions - 1 - d);
        _Pragma("GCC unroll 64") for (int e = 0; e < 1 << 2 * dimensions; e++) {
            if (PLACE(dimensions, e, d) > 0) continue;
            if (back && within(dimensions, e, 0, d, reach)) transform_side_back(reach, step, v + e);
            if (!back && within(dimensions, e, d + 1, dimensions, reach)) transform_side(reach, step, v + e);
        }
    }
}

INLINE void read_windows_of(const int dimensions, const int reach, const Windows *w, const float *map, index_t width,
                            float *to) {
    const float none[WIDTH] = {0};
    const index_t count = window_count(w), next = count * width;
    for (index_t i = 0; i < count; i++, to += width) {
        const Window window = window_at(dimensions, w, i);
        const float *from[WINDOW];
        index_t moves[WINDOW];
        for (int e = 0; e < 1 << 2 * dimensions; e++) {
            index_t behind;
            moves[e] = on_map(dimensions, w, &window, e, &behind);
            from[e] = moves[e] ? map + (window.base + behind) * width : none;
        }
        for (index_t first = 0; first < width; first += WIDTH) {
            /* The last vector may overlap the one before. */
            index_t column = smaller(first, larger(width - WIDTH, 0));
            vector v[WINDOW];
            _Pragma("GCC unroll 64") for (int e = 0; e < 1 << 2 * dimensions; e++) {
                if (!within(dimensions, e, 0, dimensions, reach)) continue;
                v[e] = (vector){0};
                if (width < WIDTH)
                    memcpy(&v[e], from[e], width * sizeof(float));
                else
                    v[e] = LOAD(from[e] + moves[e] * column);
            }
            transform_window(dimensions, reach, 0, v);
            _Pragma("GCC unroll 64") for (int e = 0; e < 1 << 2 * dimensions; e++) {
                if (width < WIDTH)
                    memcpy(to + e * next, &v[e], width * sizeof(float));
                else
                    STORE(to + e * next + column, v[e]);
            }
        }
    }
}

/* And back; here the width is whole vectors. */
INLINE void write_windows_of(const int dimensions, const int reach, const Windows *w, const float *from, index_t width,
                             float *map) {
    const index_t count = window_count(w), next = count * width;
    if (reach > 2) { /* windows of inputs overlap: they are added up */
        index_t positions = 1;
        for (int d = 0; d < dimensions; d++) positions *= w->size[d];
        memset(map, 0, positions * width * sizeof(float));
    }
    for (index_t i = 0; i < count; i++, from += width) {
        const Window window = window_at(dimensions, w, i);
        for (index_t column = 0; column < width; column += WIDTH) {
            vector v[WINDOW];
            _Pragma("GCC unroll 64") for (int e = 0; e < 1 << 2 * dimensions; e++) v[e] =
                LOAD(from + e * next + column);
            transform_window(dimensions, reach, 1, v);
            _Pragma("GCC unroll 64") for (int e = 0; e < 1 << 2 * dimensions; e++) {
                index_t behind;
                if (!within(dimensions, e, 0, dimensions, reach) || !on_map(dimensions, w, &window, e, &behind))
                    continue;
                float *to = map + (window.base + behind) * width + column;
                if (reach > 2) v[e] += LOAD(to);
                STORE(to, v[e]);
            }
        }
    }
}

/* The kernel position that a window's position e holds before it is transformed. */
INLINE int kernel_place(const int dimensions, const int e) {
    int place = 0;
    for (int d = 0; d < dimensions; d++) place = place * KERNEL + PLACE(dimensions, e, d);
    return place;
}

INLINE void transform_kernel_of(const int dimensions, const int back, float *kernel, index_t kernel_step,
                                float *transformed, index_t transformed_step, index_t numbers) {
    const int all = 1 << 2 * dimensions;
    for (index_t i = 0; i < numbers; i += WIDTH, kernel += WIDTH, transformed += WIDTH) {
        vector v[WINDOW];
        _Pragma("GCC unroll 64") for (int e = 0; e < all; e++) {
            if (back)
                v[e] = LOAD(transformed + e * transformed_step);
            else if (within(dimensions, e, 0, dimensions, KERNEL))
                v[e] = LOAD(kernel + kernel_place(dimensions, e) * kernel_step);
        }
        transform_window(dimensions, KERNEL, back, v);
        _Pragma("GCC unroll 64") for (int e = 0; e < all; e++) {
            if (!back)
                STORE(transformed + e * transformed_step, v[e]);
            else if (within(dimensions, e, 0, dimensions, KERNEL))
                STORE(kernel + kernel_place(dimensions, e) * kernel_step, v[e]);
        }
    }
}

/* Make transformed[e][i], the transformed positions of kernel[t][i]; with `back`, the gradient of kernel from that of
   transformed. There are whole vectors of numbers i. */
static void transform_kernel(int dimensions, int back, float *kernel, index_t kernel_step, float *transformed,
                             index_t transformed_step, index_t numbers) {
    switch (2 * dimensions + back) {
#define CASE(D, BACK)                                                                              \
    case 2 * D + BACK:                                                                             \
        transform_kernel_of(D, BACK, kernel, kernel_step, transformed, transformed_step, numbers); \
        break;
        CASE(1, 0) CASE(1, 1) CASE(2, 0) CASE(2, 1) CASE(3, 0) CASE(3, 1)
#undef CASE
    }
}

#define EACH_KIND(CASE) CASE(1, 2) CASE(1, 4) CASE(2, 2) CASE(2, 4) CASE(3, 2) CASE(3, 4)

/* to[e, window] = the transformed positions of a map, both [positions, width]. */
static void read_windows(const Windows *w, const float *map, index_t width, float *to) {
    switch (8 * w->dimensions + w->reach) {
#define CASE(D, R)                                \
    case 8 * D + R:                               \
        read_windows_of(D, R, w, map, width, to); \
        break;
        EACH_KIND(CASE)
#undef CASE
    }
}

/* The transpose: the positions of a map from transformed ones. */
static void write_windows(const Windows *w, const float *from, index_t width, float *map) {
    switch (8 * w->dimensions + w->reach) {
#define CASE(D, R)                                   \
    case 8 * D + R:                                  \
        write_windows_of(D, R, w, from, width, map); \
        break;
        EACH_KIND(CASE)
#undef CASE
    }
}

#endif
