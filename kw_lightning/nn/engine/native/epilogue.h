/* What is done to an output as it is written, while it is in the first-level cache: the layer's own factor and bias,
   the batch norm after the layer, a sum with another map, an activation. */

#ifndef KW_EPILOGUE_H
#define KW_EPILOGUE_H

#include <math.h>

#include "tiles.h"

/* A tensor [batch, channels, positions] in single precision, where it lies; steps in numbers. */
typedef struct {
    float *data;       /* NULL: only the sizes are used */
    index_t batch;     /* step from one sample to the next */
    index_t channel;   /* step from one channel to the next; this or `position` is 1 */
    index_t position;  /* step from one position to the next */
    index_t positions; /* of a channel */
} Map;

/* Factors are per output channel, NULL where there are none:

       act(((y scale + bias) - mean) / sqrt(variance + epsilon) weight + shift + added). */
typedef struct {
    const float *scale, *bias;                     /* the layer's own */
    const float *mean, *variance, *weight, *shift; /* the norm's; mean and variance both, or neither */
    Map added;                                     /* of the output's sizes; its data NULL if nothing is added */
    float epsilon;                                 /* the norm's */
    int32_t activation;                            /* as numbered below */
    index_t present;                               /* whether there is anything to do */
} Epilogue;

enum { IDENTITY, RELU, RELU6, HARDSWISH, SILU };

/* Positions that are finished at once. */
#define STRIP 64

typedef int32_t vector_int __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define ALL(value) ((value) - (vector){0})
/* a where the mask is set, else b. The bounds keep NaN, which compares as false. */
#define CHOOSE(mask, a, b) ((vector)(((vector_int)(a) & (mask)) | ((vector_int)(b) & ~(mask))))
#define AT_LEAST(v, bound) CHOOSE((v) < (bound), ALL(bound), v)
#define AT_MOST(v, bound) CHOOSE((v) > (bound), ALL(bound), v)

/* v / (1 + e^-v). e^u = 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor series to the seventh power: to 1e-7. */
#define SILU_OF(v, to)                                                                               \
    do {                                                                                             \
        vector u = AT_MOST(AT_LEAST(-(v), -87.0f), 87.0f), n = u * 1.44269504f, r;                   \
        n = (n + 12582912.0f) - 12582912.0f; /* to the nearest whole number */                       \
        r = (u - n * 0.693359375f) + n * 2.12194440e-4f;                                             \
        vector e = ALL(1.0f / 5040);                                                                 \
        e = e * r + 1.0f / 720, e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6; \
        e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;                                        \
        vector_int power = (__builtin_convertvector(n, vector_int) + 127) << 23;                     \
        (to) = (v) / (1.0f + e * (vector)power);                                                     \
    } while (0)

/* to = act(from scale + shift + added), in rows of `width` channels; `added` is laid out alike, or NULL. */
INLINE void finish_rows(const int activation, index_t count, index_t width, const float *from, const float *scale,
                        const float *shift, const float *added, float *to) {
    for (index_t half = 0; half < width; half += WIDTH) {
        vector factor = LOAD(scale + half), term = LOAD(shift + half);
        for (index_t i = half; i < count * width; i += width) {
            vector v = LOAD(from + i) * factor + term;
            if (added) v += LOAD(added + i);
            if (activation == RELU) v = AT_LEAST(v, 0.0f);
            if (activation == RELU6) v = AT_MOST(AT_LEAST(v, 0.0f), 6.0f);
            if (activation == HARDSWISH) v = v * AT_MOST(AT_LEAST(v + 3.0f, 0.0f), 6.0f) / 6.0f;
            if (activation == SILU) SILU_OF(v, v);
            STORE(to + i, v);
        }
    }
}

static inline void finish(const Epilogue *e, index_t count, index_t width, const float *from, const float *scale,
                          const float *shift, const float *added, float *to) {
    switch (e->activation) {
#define CASE(NAME)                                                      \
    case NAME:                                                          \
        finish_rows(NAME, count, width, from, scale, shift, added, to); \
        break;
        CASE(IDENTITY) CASE(RELU) CASE(RELU6) CASE(HARDSWISH) CASE(SILU)
#undef CASE
    }
}

/* Join the layer's own factor and bias and the norm into one factor and one term for each lane, for channels from
   `channel` on. The norm's are as torch computes them. */
static inline void join_factors(const Epilogue *e, index_t channel, index_t channels, float *scale, float *shift) {
    memset(scale, 0, LANES * sizeof(float)), memset(shift, 0, LANES * sizeof(float));
    for (index_t l = 0, c = channel; l < channels; l++, c++) {
        float factor = e->mean ? (e->weight ? e->weight[c] : 1.0f) / sqrtf(e->variance[c] + e->epsilon) : 1.0f;
        scale[l] = (e->scale ? e->scale[c] : 1.0f) * factor;
        shift[l] = ((e->bias ? e->bias[c] : 0.0f) - (e->mean ? e->mean[c] : 0.0f)) * factor;
        shift[l] += e->shift ? e->shift[c] : 0.0f;
    }
}

/* Write rows [positions, width] into some channels of a sample's map, from position `start` on, through the epilogue if
   there is one. */
static inline void write_rows(const Map *map, const Epilogue *e, index_t sample, index_t channel, index_t channels,
                              index_t width, index_t start, index_t positions, const float *from) {
    float scale[LANES], shift[LANES], finished[STRIP * LANES], read[STRIP * LANES];
    float *to = map->data + sample * map->batch + channel * map->channel + start * map->position;
    index_t strip = e->present ? STRIP : positions;
    const float *added = e->added.data;
    if (added) added += sample * e->added.batch + channel * e->added.channel + start * e->added.position;
    if (e->present) join_factors(e, channel, channels, scale, shift);
    for (index_t first = 0; first < positions; first += strip) {
        index_t count = smaller(strip, positions - first);
        const float *rows = from + first * width;
        if (e->present) {
            if (e->added.data)
                arrange(added + first * e->added.position, e->added.position, e->added.channel, read, width, count,
                        channels);
            finish(e, count, width, rows, scale, shift, e->added.data ? read : NULL, finished);
            rows = finished;
        }
        if (map->channel == 1)
            arrange(rows, width, 1, to + first * map->position, map->position, count, channels);
        else
            arrange(rows, 1, width, to + first, map->channel, channels, count);
    }
}

/* Apply the epilogue in place to rows [channels, positions], from position `start` of the map on. WIDTH positions of a
   channel are taken as a row of WIDTH channels that have the same factors. */
static inline void finish_lines(const Epilogue *e, index_t sample, index_t channel, index_t channels, index_t start,
                                index_t positions, float *rows, index_t row) {
    float scales[LANES], shifts[LANES], read[STRIP * WIDTH], rest[WIDTH], rest_added[WIDTH];
    for (index_t l = 0; l < channels; l++, channel++, rows += row) {
        vector scale, shift;
        if (l % LANES == 0) join_factors(e, channel, smaller(LANES, channels - l), scales, shifts);
        scale = ALL(scales[l % LANES]), shift = ALL(shifts[l % LANES]);
        for (index_t first = 0; first < positions; first += STRIP * WIDTH) {
            index_t count = smaller(STRIP * WIDTH, positions - first), left = count % WIDTH;
            const float *added = e->added.data;
            float *at = rows + first;
            if (added) {
                added += sample * e->added.batch + channel * e->added.channel + (start + first) * e->added.position;
                if (e->added.position != 1) {
                    for (index_t i = 0; i < count; i++) read[i] = added[i * e->added.position];
                    added = read;
                }
            }
            finish(e, count / WIDTH, WIDTH, at, (float *)&scale, (float *)&shift, added, at);
            if (left == 0) continue;
            memset(rest, 0, sizeof(rest)), memset(rest_added, 0, sizeof(rest_added));
            memcpy(rest, at + count - left, left * sizeof(float));
            if (added) memcpy(rest_added, added + count - left, left * sizeof(float));
            finish(e, 1, WIDTH, rest, (float *)&scale, (float *)&shift, added ? rest_added : NULL, rest);
            memcpy(at + count - left, rest, left * sizeof(float));
        }
    }
}

#endif
