/* Mix kernels of a depthwise convolution, in which every channel is convolved by itself.

   As mix_kernels.c, but lanes are the one channel axis of a cell: maps are read LANES channels at a time, and positions
   are multiplied lane by lane. A cell has one kernel position, so W[b, (t, g)][l] = sum over j of alpha[b, t, g, j] *
   E[j][l] is a single product for all samples, taps t and groups g of lanes. */

#include "pass.h"

/* The memory of one thread. */
typedef struct {
    float *out, *source, *other, *block, *turned, *gradient, *kernels;
} Memory;

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    int kernels = p->other.data != NULL;
    m->out = at, at += p->out.data ? p->out_positions * LANES : 0;
    m->source = at, at += p->source_positions * LANES;
    m->other = at, at += kernels ? p->out_positions * LANES : 0;
    m->block = at, at += p->cells * LANES;
    m->gradient = at, at += kernels ? p->cells * LANES : 0;
    m->turned = at, at += kernels ? LANES * padded(p->cells) : 0;
    m->kernels = at, at += p->mixed_samples * p->rows * LANES;
    return padded(at - start);
}

index_t kw_mix_depthwise_memory(const Pass *p) { return p->threads * lay_out(p, NULL, &(Memory){0}); }

/* One tile of output positions. */
INLINE void gather_rows(const int rows, const Pass *p, const int32_t *tile, const float *source, const float *kernels,
                        float *out) {
    static const float zeros[LANES];
    vector sum[ROWS][2];
    const int32_t *position = tile + 2, *tap = position + rows;
    EACH_ROW(rows) sum[r][0] = sum[r][1] = (vector){0};
    for (index_t t = 0; t < tile[1]; t++, tap += 1 + rows) {
        const float *kernel = kernels + tap[0] * p->row_tap * LANES;
        vector k0 = LOAD(kernel), k1 = LOAD(kernel + WIDTH);
        EACH_ROW(rows) {
            const float *a = tap[1 + r] < 0 ? zeros : source + (index_t)tap[1 + r] * LANES;
            sum[r][0] += LOAD(a) * k0;
            sum[r][1] += LOAD(a + WIDTH) * k1;
        }
    }
    EACH_ROW(rows) {
        float *c = out + (index_t)position[r] * LANES;
        STORE(c, sum[r][0]);
        STORE(c + WIDTH, sum[r][1]);
    }
}

static void gather(const Pass *p, const int32_t *tile, const float *source, const float *kernels, float *out) {
    switch (tile[0]) {
#define CASE(N)                                        \
    case N:                                            \
        gather_rows(N, p, tile, source, kernels, out); \
        break;
        EACH_COUNT(CASE)
#undef CASE
    }
}

/* The gradient of one tap's lanes: the sum over runs of positions of source times other. */
static void inner(const int32_t *run, const int32_t *end, const float *source, const float *other, float *c, int add) {
    vector sum[4][2]; /* of positions in turn: one sum alone would wait for itself */
    for (int r = 0; r < 4; r++) sum[r][0] = sum[r][1] = (vector){0};
    if (add) sum[0][0] = LOAD(c), sum[0][1] = LOAD(c + WIDTH);
    for (; run < end; run += 4) {
        const float *a = source + (index_t)run[0] * LANES, *b = other + (index_t)run[1] * LANES;
        index_t k = run[3], step = (index_t)run[2] * LANES;
        for (; k >= 4; k -= 4)
            for (int r = 0; r < 4; r++, a += LANES, b += step) {
                sum[r][0] += LOAD(a) * LOAD(b);
                sum[r][1] += LOAD(a + WIDTH) * LOAD(b + WIDTH);
            }
        for (; k > 0; k--, a += LANES, b += step) {
            sum[0][0] += LOAD(a) * LOAD(b);
            sum[0][1] += LOAD(a + WIDTH) * LOAD(b + WIDTH);
        }
    }
    STORE(c, (sum[0][0] + sum[1][0]) + (sum[2][0] + sum[3][0]));
    STORE(c + WIDTH, (sum[0][1] + sum[1][1]) + (sum[2][1] + sum[3][1]));
}

/* One sample and group of lanes: its kernels are applied, and replaced by their gradient. */
static void convolve(const Pass *p, index_t sample, index_t group, index_t lane, index_t lanes, float *kernels,
                     const Memory *m) {
    index_t channel = group * p->lanes + lane;
    read_map(&p->source, &p->source_sums, sample, channel, lanes, p->source_positions, LANES, NULL, m->source);
    if (p->out.data) {
        for (index_t t = 0; t < p->tiles; t++) gather(p, p->tile + p->tile_start[t], m->source, kernels, m->out);
        write_map(p, sample, channel, lanes, NULL, m->out);
    }
    if (p->other.data) {
        read_map(&p->other, &p->other_sums, sample, channel, lanes, p->out_positions, LANES, NULL, m->other);
        for (const int32_t *s = p->span, *end = s + 4 * p->spans; s < end; s += 4)
            inner(p->run + 4 * s[2], p->run + 4 * s[3], m->source, m->other, kernels + s[0] * p->row_tap * LANES, s[1]);
    }
}

/* Some lanes of samples first to last of the batch, which read their own source. */
static void run_lanes(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                      float *memory, float *alpha_gradient, float *cell_gradient, int add) {
    (void)source;
    Memory own, *m = &own;
    lay_out(p, memory, m);
    index_t lanes = smaller(LANES, p->lanes - lane), width = padded(p->cells);
    pack_cells(p, group, lane, lanes, 0, 1, m->block, LANES, p->cells * LANES);
    if (alpha_gradient) turn_cells(p, 1, m->block, m->turned);
    for (index_t b = first; b < last; b += p->mixed_samples) {
        index_t samples = smaller(p->mixed_samples, last - b), rows = samples * p->rows;
        const float *alpha = p->alpha + b * p->rows * p->cells;
        if (p->out.data) product(rows, 2, p->cells, alpha, p->cells, 1, m->block, LANES, m->kernels, LANES, 0);
        for (index_t i = 0; i < samples * p->lane_groups; i++) {
            index_t sample = i / p->lane_groups, g = i % p->lane_groups;
            convolve(p, b + sample, g, lane, lanes, m->kernels + (sample * p->rows + g * p->row_lane) * LANES, m);
        }
        for (index_t j = 0; alpha_gradient && j < p->cells; j += LANES)
            product(rows, p->cells - j > WIDTH ? 2 : 1, LANES, m->kernels, LANES, 1, m->turned + j * LANES, LANES,
                    alpha_gradient + b * p->rows * width + j, width, 1);
        if (cell_gradient)
            product(p->cells, 2, rows, alpha, 1, p->cells, m->kernels, LANES, m->gradient, LANES, b > first);
    }
    if (cell_gradient)
        unpack_cells(p, group, lane, lanes, 0, 1, m->gradient, LANES, p->cells * LANES, cell_gradient, add);
}

void kw_mix_depthwise(const Pass *p) { share_out(p, lay_out(p, NULL, &(Memory){0}), 0, run_lanes); }
