/* The attention's last step, from z = V h + c to alpha, and backwards: each mixture of each sample is read once.

   alpha[j] = temperature * (j == initial) + share * z[j] for j < cells, where share = (1 - temperature) / size and
   size = the sum over all cells + 1 columns of |z|, and a little: the last column is the zero cell's, and dropped. */

#include <math.h>

#include "tiles.h"

#define SMALLEST_SIZE 1e-3f
/* Numbers of z that are worth a second thread. */
#define SHARED 32768

static float find_size(const float *z, index_t columns) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t j = 0; j < columns; j++) sum += fabsf(z[j]);
    return sum + SMALLEST_SIZE;
}

/* The gradient of |z| times that of z; 0 where z is. */
INLINE float turn(float gradient, float z) { return z > 0 ? gradient : z < 0 ? -gradient : 0; }

/* z [batch, mixtures, cells + 1], initial [mixtures], alpha [batch, mixtures, cells] written. */
void kw_weigh(const float *z, const int64_t *initial, const float *temperature, index_t batch, index_t mixtures,
              index_t cells, index_t threads, float *alpha) {
    index_t rows = batch * mixtures;
    float begin = *temperature;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * cells > SHARED)
    for (index_t row = 0; row < rows; row++) {
        const float *from = z + row * (cells + 1);
        float *to = alpha + row * cells, share = (1 - begin) / find_size(from, cells + 1);
        index_t first = initial[row % mixtures];
#pragma omp simd
        for (index_t j = 0; j < cells; j++) to[j] = share * from[j];
        if (first < cells) to[first] += begin;
    }
}

/* z becomes its own gradient, of alpha's gradient [batch, mixtures, cells]. */
void kw_differentiate_weights(float *z, const float *gradient, const float *temperature, index_t batch,
                              index_t mixtures, index_t cells, index_t threads) {
    index_t rows = batch * mixtures;
    float rest = 1 - *temperature;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * cells > SHARED)
    for (index_t row = 0; row < rows; row++) {
        float *at = z + row * (cells + 1), size = find_size(at, cells + 1), share = rest / size, sum = 0;
        const float *of_alpha = gradient + row * cells;
#pragma omp simd reduction(+ : sum)
        for (index_t j = 0; j < cells; j++) sum += of_alpha[j] * at[j];
        float of_size = -sum * share / size;
#pragma omp simd
        for (index_t j = 0; j < cells; j++) at[j] = turn(of_size, at[j]) + share * of_alpha[j];
        at[cells] = turn(of_size, at[cells]);
    }
}
