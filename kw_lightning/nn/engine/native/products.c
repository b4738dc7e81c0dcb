/* Dot products of many rows with one vector, by which engine/contents.py sees whether cells have changed.

   They are as fast as memory is read; this takes several sums a row, and all threads. */

#include "tiles.h"

#define SUMS 4

static float row_product(const float *row, const float *other, index_t length) {
    vector sum[SUMS] = {{0}};
    index_t i = 0;
    for (; i + SUMS * WIDTH <= length; i += SUMS * WIDTH)
        for (int s = 0; s < SUMS; s++) sum[s] += LOAD(row + i + s * WIDTH) * LOAD(other + i + s * WIDTH);
    float total = 0;
    for (; i < length; i++) total += row[i] * other[i];
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int l = 0; l < WIDTH; l++) total += sum[0][l];
    return total;
}

/* products[i] = sum over k of rows[i, k] * other[k]. */
void kw_row_products(const float *rows, index_t count, index_t length, const float *other, float *products,
                     index_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < count; i++) products[i] = row_product(rows + i * length, other, length);
}
