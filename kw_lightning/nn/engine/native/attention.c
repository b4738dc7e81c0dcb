/* The attention: one pass over a map, then so few numbers that separate operators would take longer to call than to
   compute. */

#include "attention.h"

#include <math.h>

/* What is added to the sum of |z|, as published and as in weighing.py. */
#define SMALLEST_SIZE 1e-3f
/* Numbers that are added up in single precision, before their sum is added in double precision. */
#define RUN 512
/* Channels that are averaged at once. */
#define TOGETHER 256
/* What is added up side by side: channels, where positions are contiguous, or positions, where channels are. */
#define LINES 4
#define ROWS_ADDED 8
/* Backwards, numbers of z of one mixture that exist at once. */
#define KEPT 65536

/* Four rows of a matrix times a vector: a single sum would wait for each of its additions. */
static void four_rows(const float *row, index_t length, const float *x, float *y) {
    const float *second = row + length, *third = second + length, *fourth = third + length;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (index_t i = 0; i < length; i++) {
        a += row[i] * x[i];
        b += second[i] * x[i];
        c += third[i] * x[i];
        d += fourth[i] * x[i];
    }
    y[0] = a, y[1] = b, y[2] = c, y[3] = d;
}

static void multiply(const float *matrix, index_t rows, index_t length, const float *x, float *y) {
    index_t row = 0;
    for (; row + 4 <= rows; row += 4) four_rows(matrix + row * length, length, x, y + row);
    for (; row < rows; row++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (index_t i = 0; i < length; i++) sum += matrix[row * length + i] * x[i];
        y[row] = sum;
    }
}

/* Mean and variance of numbers that lie `step` apart. */
static void find_statistics(const float *x, index_t count, index_t step, float *mean, float *variance) {
    double sum = 0, squares = 0;
    for (index_t i = 0; i < count; i++) sum += x[i * step];
    double middle = sum / count;
    for (index_t i = 0; i < count; i++) squares += (x[i * step] - middle) * (x[i * step] - middle);
    *mean = middle, *variance = squares / count;
}

/* Add up the positions, which are contiguous, of LINES channels, `step` from one to the next; side by side, since a
   single sum would wait for each of its additions. `rest` masks those of the last WIDTH positions that are in no whole
   vector. */
static void add_positions(const float *x, index_t step, index_t positions, vector_int rest, double *total) {
    for (index_t first = 0; first < positions; first += RUN) {
        index_t i = first, last = smaller(first + RUN, positions);
        const float *a = x, *b = x + step, *c = b + step, *d = c + step;
        vector sum[LINES] = {{0}, {0}, {0}, {0}};
        for (; i + WIDTH <= last; i += WIDTH) {
            sum[0] += LOAD(a + i), sum[1] += LOAD(b + i);
            sum[2] += LOAD(c + i), sum[3] += LOAD(d + i);
        }
        if (i < last) { /* the last WIDTH positions, of which `rest` are not added yet */
            i = last - WIDTH;
            sum[0] += CHOOSE(rest, LOAD(a + i), (vector){0}), sum[1] += CHOOSE(rest, LOAD(b + i), (vector){0});
            sum[2] += CHOOSE(rest, LOAD(c + i), (vector){0}), sum[3] += CHOOSE(rest, LOAD(d + i), (vector){0});
        }
        four quarter[LINES], turned[LINES];
        for (index_t l = 0; l < LINES; l++) {
            const float *of = (const float *)&sum[l];
            quarter[l] = FOUR(of);
            for (index_t k = 4; k < WIDTH; k += 4) quarter[l] += FOUR(of + k);
        }
        turn_four((const float *)quarter, 4, (float *)turned, 4);
        quarter[0] = (turned[0] + turned[1]) + (turned[2] + turned[3]);
        for (index_t l = 0; l < LINES; l++) total[l] += quarter[0][l];
    }
}

/* The means of some channels, `step` from one to the next, whose positions are contiguous. */
static void average_lines(const float *x, index_t step, index_t positions, index_t channels, float *mean) {
    vector_int rest;
    for (index_t l = 0; l < WIDTH; l++) rest[l] = l < WIDTH - positions % WIDTH ? 0 : -1;
    index_t c = 0;
    for (; positions >= WIDTH && c + LINES <= channels; c += LINES) {
        double total[LINES] = {0};
        add_positions(x + c * step, step, positions, rest, total);
        for (index_t l = 0; l < LINES; l++) mean[c + l] = total[l] / positions;
    }
    for (; c < channels; c++) {
        double total = 0;
        for (index_t i = 0; i < positions; i++) total += x[c * step + i];
        mean[c] = total / positions;
    }
}

/* The means of some contiguous channels, `step` from one position to the next. */
static void average_channels(const float *x, index_t step, index_t positions, index_t channels, float *mean) {
    double total[TOGETHER] = {0};
    for (index_t first = 0; first < positions; first += RUN) {
        float sum[TOGETHER] = {0};
        index_t i = first, last = smaller(first + RUN, positions);
        for (; i + ROWS_ADDED <= last; i += ROWS_ADDED) {
            const float *at = x + i * step;
#pragma omp simd
            for (index_t c = 0; c < channels; c++)
                sum[c] += ((at[c] + at[step + c]) + (at[2 * step + c] + at[3 * step + c])) +
                          ((at[4 * step + c] + at[5 * step + c]) + (at[6 * step + c] + at[7 * step + c]));
        }
        for (; i < last; i++)
#pragma omp simd
            for (index_t c = 0; c < channels; c++) sum[c] += x[i * step + c];
        for (index_t c = 0; c < channels; c++) total[c] += sum[c];
    }
    for (index_t c = 0; c < channels; c++) mean[c] = total[c] / positions;
}

/* A thread takes some channels of one sample, long runs of memory. */
static void pool(const Hidden *p) {
    void (*average)(const float *, index_t, index_t, index_t, float *) = average_channels;
    index_t step = p->x.position;
    if (step == 1) average = average_lines, step = p->x.channel;
    index_t shared = p->batch < p->threads ? pieces(p->channels, p->threads) : p->channels;
    index_t size = smaller(TOGETHER, padded(shared)), blocks = pieces(p->channels, size);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < p->batch * blocks; i++) {
        index_t b = i / blocks, channel = i % blocks * size;
        average(p->x.data + b * p->x.batch + channel * p->x.channel, step, p->x.positions,
                smaller(size, p->channels - channel), p->pooled + b * p->channels + channel);
    }
}

/* Move the running statistics towards the batch's by `momentum`, with the unbiased estimate of its variance. */
static void take_note(const Hidden *p) {
    float part = p->momentum, unbiased = (float)p->batch / (p->batch - 1);
    for (index_t k = 0; k < p->width; k++) {
        p->running_mean[k] += part * (p->mean[k] - p->running_mean[k]);
        p->running_variance[k] += part * (p->variance[k] * unbiased - p->running_variance[k]);
    }
}

void kw_hidden(const Hidden *p) {
    index_t width = p->width;
    if (p->x.data) pool(p);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t b = 0; b < p->batch; b++) {
        float *raw = p->raw + b * width;
        multiply(p->reduce, width, p->channels, p->pooled + b * p->channels, raw);
        for (index_t k = 0; p->bias && k < width; k++) raw[k] += p->bias[k];
        if (p->statistics == OF_SAMPLE) find_statistics(raw, width, 1, p->mean + b, p->variance + b);
    }
    if (p->statistics == OF_BATCH)
        for (index_t k = 0; k < width; k++) find_statistics(p->raw + k, p->batch, width, p->mean + k, p->variance + k);
    if (p->statistics == OF_BATCH && p->running_mean) take_note(p);
    for (index_t b = 0; b < p->batch; b++)
        for (index_t k = 0; k < width; k++) {
            index_t i = b * width + k, s = p->statistics == OF_SAMPLE ? b : k;
            float slope = p->scale[k] / sqrtf(p->variance[s] + p->epsilon);
            float y = (p->raw[i] - p->mean[s]) * slope + p->shift[k];
            p->hidden[i] = y < 0 ? 0 : y; /* NaN stays NaN */
        }
}

/* Turn the gradient of `count` normalised numbers times `scale` into that of these numbers, `raw`. They were normalised
   together, and are `step` apart in both; `scale` is one number if scale_step is 0. If `given`, mean and variance are
   constants. */
static void differentiate_group(const float *raw, float *gradient, const float *scale, index_t scale_step,
                                index_t count, index_t step, float mean, float inverse, int given) {
    double sum = 0, product = 0;
    for (index_t i = 0; i < count && !given; i++) {
        float of_normal = gradient[i * step] * scale[i * scale_step];
        sum += of_normal;
        product += of_normal * (raw[i * step] - mean) * inverse;
    }
    for (index_t i = 0; i < count; i++) {
        float of_normal = gradient[i * step] * scale[i * scale_step], normal = (raw[i * step] - mean) * inverse;
        gradient[i * step] = inverse * (of_normal - (float)(sum / count) - normal * (float)(product / count));
    }
}

/* c[r] = sum over k of a[r, k] * b[k] for some of b's columns; fewer than LANES are not copied into a block first. */
static void multiply_columns(index_t rows, index_t length, const float *a, index_t a_row, index_t a_step,
                             const float *b, float *c, index_t row, index_t columns) {
    if (columns == LANES) {
        product(rows, 2, length, a, a_row, a_step, b, row, c, row, 0);
        return;
    }
    for (index_t r = 0; r < rows; r++) {
        float sum[LANES] = {0};
        for (index_t k = 0; k < length; k++)
#pragma omp simd
            for (index_t l = 0; l < columns; l++) sum[l] += a[r * a_row + k * a_step] * b[k * row + l];
        memcpy(c + r * row, sum, columns * sizeof(float));
    }
}

/* The gradients of the linear layer and of its input, from that of its output. A thread takes some channels. */
static void differentiate_linear(const Hidden *p) {
    index_t channels = p->channels, width = p->width, batch = p->batch;
    float share = 1.0f / p->x.positions;
    for (index_t k = 0; p->bias_gradient && k < width; k++) {
        double sum = 0;
        for (index_t b = 0; b < batch; b++) sum += p->gradient[b * width + k];
        p->bias_gradient[k] = sum;
    }
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t c = 0; c < channels; c += LANES) {
        index_t columns = smaller(LANES, channels - c);
        if (p->reduce_gradient)
            multiply_columns(width, batch, p->gradient, 1, width, p->pooled + c, p->reduce_gradient + c, channels,
                             columns);
        if (!p->x_gradient) continue;
        multiply_columns(batch, width, p->gradient, width, 1, p->reduce + c, p->x_gradient + c, channels, columns);
        for (index_t b = 0; b < batch; b++)
#pragma omp simd
            for (index_t l = 0; l < columns; l++) p->x_gradient[b * channels + c + l] *= share;
    }
}

void kw_hidden_backward(const Hidden *p) {
    index_t width = p->width;
    int by_sample = p->statistics == OF_SAMPLE;
    for (index_t k = 0; k < width; k++) {
        double scale = 0, shift = 0;
        for (index_t b = 0; b < p->batch; b++) {
            index_t i = b * width + k, s = by_sample ? b : k;
            if (p->hidden[i] <= 0) p->gradient[i] = 0;
            shift += p->gradient[i];
            scale += p->gradient[i] * (p->raw[i] - p->mean[s]) / sqrtf(p->variance[s] + p->epsilon);
        }
        p->scale_gradient[k] = scale, p->shift_gradient[k] = shift;
    }
    for (index_t g = 0; g < (by_sample ? p->batch : width); g++) {
        float inverse = 1 / sqrtf(p->variance[g] + p->epsilon);
        if (by_sample)
            differentiate_group(p->raw + g * width, p->gradient + g * width, p->scale, 1, width, 1, p->mean[g], inverse,
                                0);
        else
            differentiate_group(p->raw + g, p->gradient + g, p->scale + g, 0, p->batch, width, p->mean[g], inverse,
                                p->statistics == GIVEN);
    }
    differentiate_linear(p);
}

/* The memory of one thread; the block and hidden_gradient backwards only. */
typedef struct {
    float *turned;          /* [width, LANES]: some columns' weights */
    float *z;               /* [samples, padded columns] */
    float *sizes;           /* [samples] */
    float *block;           /* [columns, LANES] */
    float *hidden_gradient; /* [batch, padded width], this thread's part */
    index_t samples, columns;
} Memory;

static index_t lay_out(const Weighing *p, float *at, Memory *m) {
    float *start = at;
    int backward = p->weight_gradient != NULL;
    m->columns = backward ? padded(p->cells + 1) : LANES;
    m->samples = backward ? larger(1, smaller(p->batch, KEPT / m->columns)) : p->batch;
    m->turned = at, at += p->width * LANES;
    m->z = at, at += m->samples * m->columns;
    m->sizes = at, at += padded(m->samples);
    m->block = at, at += backward ? m->columns * LANES : 0;
    m->hidden_gradient = at, at += backward ? p->batch * padded(p->width) : 0;
    return padded(at - start);
}

static index_t hidden_numbers(const Weighing *p) {
    return p->weight_gradient ? padded(p->batch * padded(p->width)) : 0;
}

index_t kw_weigh_memory(const Weighing *p) { return hidden_numbers(p) + p->threads * lay_out(p, NULL, &(Memory){0}); }

/* z of LANES columns of a mixture from `column` on, of some samples; 0 beyond the last. */
static void make_z(const Weighing *p, index_t mixture, index_t column, index_t first, index_t samples, float *turned,
                   float *z, index_t z_row) {
    index_t row = mixture * (p->cells + 1) + column, count = smaller(LANES, p->cells + 1 - column);
    if (count < LANES) memset(turned, 0, p->width * LANES * sizeof(float));
    arrange(p->weight + row * p->width, 1, p->width, turned, LANES, p->width, count);
    float start[LANES] = {0};
    memcpy(start, p->bias + row, count * sizeof(float));
    for (index_t b = 0; b < samples; b++) {
        STORE(z + b * z_row, LOAD(start));
        STORE(z + b * z_row + WIDTH, LOAD(start + WIDTH));
    }
    product(samples, 2, p->width, p->hidden + first * p->width, p->width, 1, turned, LANES, z, z_row, 1);
}

static float add_absolutes(const float *z, index_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t j = 0; j < count; j++) sum += fabsf(z[j]);
    return sum;
}

static void weigh_mixture(const Weighing *p, index_t mixture, const Memory *m) {
    for (index_t b = 0; b < p->batch; b++) m->sizes[b] = SMALLEST_SIZE;
    for (index_t column = 0; column <= p->cells; column += LANES) {
        make_z(p, mixture, column, 0, p->batch, m->turned, m->z, LANES);
        index_t count = smaller(LANES, p->cells - column);
        for (index_t b = 0; b < p->batch; b++) {
            m->sizes[b] += add_absolutes(m->z + b * LANES, LANES);
            if (!p->alpha) continue;
            float *alpha = p->alpha + (b * p->mixtures + mixture) * p->cells + column;
            for (index_t j = 0; j < count; j++) alpha[j] = m->z[b * LANES + j];
        }
    }
    for (index_t b = 0; b < p->batch; b++) {
        if (!p->alpha) {
            p->sizes[b * p->mixtures + mixture] = m->sizes[b];
            continue;
        }
        float *alpha = p->alpha + (b * p->mixtures + mixture) * p->cells;
        float share = (1 - *p->temperature) / m->sizes[b];
#pragma omp simd
        for (index_t j = 0; j < p->cells; j++) alpha[j] *= share;
        if (p->initial[mixture] < p->cells) alpha[p->initial[mixture]] += *p->temperature;
    }
}

/* The gradient of z from that of |z|; 0 where z is 0. */
INLINE float turn(float gradient, float z) { return z > 0 ? gradient : z < 0 ? -gradient : 0; }

/* Replace z by its gradient, from that of its size. */
static void differentiate_size(const Weighing *p, float gradient, float *z) {
#pragma omp simd
    for (index_t j = 0; j <= p->cells; j++) z[j] = turn(gradient, z[j]);
}

/* The same from that of alpha. */
static void differentiate_z(const Weighing *p, const float *gradient, float *z) {
    float size = add_absolutes(z, p->cells + 1) + SMALLEST_SIZE, share = (1 - *p->temperature) / size, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t j = 0; j < p->cells; j++) sum += gradient[j] * z[j];
    float of_size = -sum * share / size;
#pragma omp simd
    for (index_t j = 0; j < p->cells; j++) z[j] = turn(of_size, z[j]) + share * gradient[j];
    z[p->cells] = turn(of_size, z[p->cells]);
}

static void differentiate_mixture(const Weighing *p, index_t mixture, const Memory *m) {
    index_t columns = p->cells + 1, width = p->width, step = padded(width);
    const float *weight = p->weight + mixture * columns * width, *hidden = p->memory;
    float *to = p->weight_gradient + mixture * columns * width, *of_bias = p->bias_gradient + mixture * columns;
    for (index_t first = 0; first < p->batch; first += m->samples) {
        index_t samples = smaller(m->samples, p->batch - first);
        for (index_t column = 0; column < columns; column += LANES)
            make_z(p, mixture, column, first, samples, m->turned, m->z + column, m->columns);
        for (index_t b = 0; b < samples; b++) {
            float *z = m->z + b * m->columns;
            index_t row = (first + b) * p->mixtures + mixture;
            if (p->alpha)
                differentiate_z(p, p->alpha + row * p->cells, z);
            else
                differentiate_size(p, p->sizes[row], z);
            for (index_t j = 0; j < columns; j++) of_bias[j] = first + b > 0 ? of_bias[j] + z[j] : z[j];
        }
        for (index_t k = 0; k < width; k += LANES) {
            index_t count = smaller(LANES, width - k);
            int vectors = count > WIDTH ? 2 : 1;
            product(columns, vectors, samples, m->z, 1, m->columns, hidden + first * step + k, step, m->block, LANES,
                    0);
            for (index_t j = 0; j < columns; j++)
                for (index_t l = 0; l < count; l++) {
                    float *at = to + j * width + k + l, found = m->block[j * LANES + l];
                    *at = first > 0 ? *at + found : found;
                }
            if (count < LANES) memset(m->block, 0, columns * LANES * sizeof(float));
            arrange(weight + k, width, 1, m->block, LANES, columns, count);
            product(samples, vectors, columns, m->z, m->columns, 1, m->block, LANES,
                    m->hidden_gradient + first * step + k, step, 1);
        }
    }
}

static void each_mixture(const Weighing *p, void (*work)(const Weighing *, index_t, const Memory *)) {
    index_t size = lay_out(p, NULL, &(Memory){0}), of_hidden = p->batch * padded(p->width);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Memory own;
        lay_out(p, p->memory + hidden_numbers(p) + thread * size, &own);
        if (p->hidden_gradient) memset(own.hidden_gradient, 0, of_hidden * sizeof(float));
        for (index_t i = p->mixtures * thread / p->threads; i < p->mixtures * (thread + 1) / p->threads; i++)
            work(p, i, &own);
    }
}

void kw_weigh(const Weighing *p) { each_mixture(p, weigh_mixture); }

/* Add up all threads' parts of the hidden activations' gradient. */
static void add_parts(const Weighing *p) {
    index_t size = lay_out(p, NULL, &(Memory){0}), row = padded(p->width);
    for (index_t thread = 0; thread < p->threads; thread++) {
        Memory own;
        lay_out(p, p->memory + hidden_numbers(p) + thread * size, &own);
        for (index_t b = 0; b < p->batch; b++) {
            float *to = p->hidden_gradient + b * p->width;
#pragma omp simd
            for (index_t k = 0; k < p->width; k++)
                to[k] = own.hidden_gradient[b * row + k] + (thread > 0 ? to[k] : 0.0f);
        }
    }
}

void kw_weigh_backward(const Weighing *p) {
    index_t row = padded(p->width);
    for (index_t b = 0; b < p->batch; b++) {
        memcpy(p->memory + b * row, p->hidden + b * p->width, p->width * sizeof(float));
        memset(p->memory + b * row + p->width, 0, (row - p->width) * sizeof(float));
    }
    each_mixture(p, differentiate_mixture);
    add_parts(p);
}
