/* Mix kernels block by block in the cache, use them and forget them: no sample's kernel is ever whole in memory.

   One pass computes, for every sample b and group g of lanes,

       out[b, p, g, l] = sum over taps t, groups h of depths and depths d of
                         source[b, reads(t, p), h, d] * W[b, (t, g, h)][d, l],
       W[b, r] = sum over j of alpha[b, r, j] * E[j],

   and that for each group of a grouped convolution.

   Lanes l and depths d are the two channel axes of a cell: output and input channels in the forward pass, input and
   output channels for the gradient of the input. A block is LANES lanes by some depths of every cell. It is packed
   once; from it the kernels of all samples are mixed and applied, and, backwards, replaced by their gradient, which is
   folded into those of alpha and E at once.

   Winograd's form of a 3x3 convolution is the same pass between other positions: sums of input positions are read, sums
   of output positions are written (`Sums`), and alpha comes transformed, which the mixture, being linear, allows.

   Along the attention's rank, a mixture is of few bases of its own, which are mixtures of the cells:

       W[b, r] = sum over k of alpha[b, r, k] * B[r, k],  B[r, k] = sum over j of base[r, k, j] * E[j].

   The bases of a block are mixed before the kernels, once for all samples, and never see the memory either, unless they
   are to be kept; backwards, their gradient is collected over the samples, then folded into those of base and E. */

#include "pass.h"

/* Cells whose lanes stay in the first-level cache while all bases are mixed of them. */
#define CELLS 128

/* The memory of one thread. */
typedef struct {
    float *mapped, *out, *other, *block, *turned, *gradient, *kernels, *zeros;
    float *base, *base_turned, *base_gradient;
} Memory;

/* Numbers of a mixture in a block; no power of two, so that mixtures share no set of the cache. */
static index_t kernel_step(const Pass *p) { return (p->block_depths + 1) * LANES; }

/* Groups of lanes of which one block of a cell mixes kernels, in all groups of the convolution. */
static index_t lane_groups(const Pass *p) { return p->groups * p->lane_groups; }

/* Numbers of a group's source in one sample. */
static index_t group_size(const Pass *p) { return p->source_positions * group_depths(p); }

/* Numbers of a basis in a block. */
static index_t base_step(const Pass *p) { return p->block_depths * LANES; }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    index_t block = p->block_depths * p->cells * LANES, each = pieces(p->read_samples, p->parts) * lane_groups(p);
    int kernels = p->other.data != NULL;
    m->mapped = at, at += larger(p->source.positions, p->out.positions) * larger(p->block_depths, LANES);
    m->out = at, at += p->out.data ? each * p->out_positions * LANES : 0;
    m->other = at, at += kernels ? each * p->out_positions * LANES : 0;
    m->block = at, at += block;
    m->gradient = at, at += kernels ? block : 0;
    m->turned = at, at += kernels ? p->block_depths * LANES * padded(p->cells) : 0;
    m->kernels = at, at += p->mixed_samples * p->rows * kernel_step(p);
    m->zeros = at, at += p->block_depths;
    m->base = at, at += p->kept ? 0 : bases(p) * base_step(p);
    m->base_gradient = at, at += kernels ? bases(p) * base_step(p) : 0;
    m->base_turned = at, at += kernels ? p->rows * padded(p->ranks) * base_step(p) : 0;
    return padded(at - start);
}

index_t kw_lanes(void) { return LANES; }
index_t kw_rows(void) { return ROWS; }

index_t kw_mix_kernels_memory(const Pass *p) {
    return p->read_samples * sample_size(p) + p->threads * lay_out(p, NULL, &(Memory){0});
}

/* One tile of output positions. */
INLINE void gather_rows(const int rows, const Pass *p, const int32_t *tile, const float *source, const float *zeros,
                        index_t depths, const float *kernels, float *out, int add) {
    vector sum[ROWS][2];
    const int32_t *position = tile + 2, *tap = position + rows;
    EACH_ROW(rows) {
        const float *c = out + (index_t)position[r] * LANES;
        sum[r][0] = add ? LOAD(c) : (vector){0};
        sum[r][1] = add ? LOAD(c + WIDTH) : (vector){0};
    }
    for (index_t t = 0; t < tile[1]; t++, tap += 1 + rows)
        for (index_t h = 0; h < p->depth_groups; h++) {
            const float *a[ROWS], *from = source + h * p->source_positions * p->depths;
            const float *b = kernels + (tap[0] * p->row_tap + h * p->row_depth) * kernel_step(p);
            EACH_ROW(rows) a[r] = tap[1 + r] < 0 ? zeros : from + (index_t)tap[1 + r] * depths;
            for (index_t d = 0; d < depths; d++, b += LANES) {
                vector b0 = LOAD(b), b1 = LOAD(b + WIDTH);
                EACH_ROW(rows) {
                    sum[r][0] += a[r][d] * b0;
                    sum[r][1] += a[r][d] * b1;
                }
            }
        }
    EACH_ROW(rows) {
        float *c = out + (index_t)position[r] * LANES;
        STORE(c, sum[r][0]);
        STORE(c + WIDTH, sum[r][1]);
    }
}

static void gather(const Pass *p, const int32_t *tile, const float *source, const float *zeros, index_t depths,
                   const float *kernels, float *out, int add) {
    switch (tile[0]) {
#define CASE(N)                                                            \
    case N:                                                                \
        gather_rows(N, p, tile, source, zeros, depths, kernels, out, add); \
        break;
        EACH_COUNT(CASE)
#undef CASE
    }
}

/* Some depths of one mixture's gradient: the sum over runs of positions of source times other. */
INLINE void outer_rows(const int rows, const int32_t *run, const int32_t *end, const float *source, index_t depths,
                       const float *other, float *c, int add) {
    vector sum[ROWS][2];
    EACH_ROW(rows) {
        sum[r][0] = add ? LOAD(c + r * LANES) : (vector){0};
        sum[r][1] = add ? LOAD(c + r * LANES + WIDTH) : (vector){0};
    }
    for (; run < end; run += 4) {
        const float *a = source + run[0] * depths, *b = other + (index_t)run[1] * LANES;
        for (index_t k = run[3], step = (index_t)run[2] * LANES; k > 0; k--, a += depths, b += step) {
            vector b0 = LOAD(b), b1 = LOAD(b + WIDTH);
            EACH_ROW(rows) {
                sum[r][0] += a[r] * b0;
                sum[r][1] += a[r] * b1;
            }
        }
    }
    EACH_ROW(rows) {
        STORE(c + r * LANES, sum[r][0]);
        STORE(c + r * LANES + WIDTH, sum[r][1]);
    }
}

static void outer(const int32_t *run, const int32_t *end, const float *source, index_t depths, const float *other,
                  float *c, int add) {
    for (index_t tiles = pieces(depths, ROWS), first = 0; tiles > 0; tiles--) {
        index_t count = (depths - first) / tiles, d = first;
        first += count;
        switch (count) {
#define CASE(N)                                                                 \
    case N:                                                                     \
        outer_rows(N, run, end, source + d, depths, other, c + d * LANES, add); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

/* One block of the cells, its kernels mixed for samples of the batch. */
typedef struct {
    index_t depth, depths;
    index_t first;       /* of the samples, in the batch */
    const float *source; /* of that sample */
    float *out, *other;  /* of that sample */
} Block;

/* Mix the bases of a block, by so many cells at a time that they stay in the first-level cache. */
static void mix_bases(const Pass *p, index_t depths, const Memory *m) {
    for (index_t d = 0; d < depths; d++)
        for (index_t j = 0; j < p->cells; j += CELLS)
            product(bases(p), 2, smaller(CELLS, p->cells - j), p->base + j, p->cells, 1,
                    m->block + (d * p->cells + j) * LANES, LANES, m->base + d * LANES, base_step(p), j > 0);
}

/* turned[mixture][panel of LANES bases][d, l][basis], as turn_cells does. */
static void turn_bases(const Pass *p, index_t depths, const Memory *m) {
    for (index_t r = 0; r < p->rows; r++)
        for (index_t j = 0; j < p->ranks; j += LANES) {
            index_t count = smaller(LANES, p->ranks - j);
            float *panel = m->base_turned + (r * padded(p->ranks) + j) * base_step(p);
            if (count < LANES) memset(panel, 0, depths * LANES * LANES * sizeof(float));
            for (index_t d = 0; d < depths; d++)
                arrange(m->base + (r * p->ranks + j) * base_step(p) + d * LANES, 1, base_step(p),
                        panel + d * LANES * LANES, LANES, LANES, count);
        }
}

/* From the bases' gradient of a block, its part of that of base, and the block of E's. */
static void fold_bases(const Pass *p, index_t depths, const Memory *m, float *gradient) {
    index_t width = padded(p->cells);
    for (index_t j = 0; gradient && j < p->cells; j += LANES)
        product(bases(p), p->cells - j > WIDTH ? 2 : 1, depths * LANES, m->base_gradient, base_step(p), 1,
                m->turned + j * depths * LANES, LANES, gradient + j, width, 1);
    for (index_t d = 0; p->cell_gradient && d < depths; d++)
        product(p->cells, 2, bases(p), p->base, 1, p->cells, m->base_gradient + d * LANES, base_step(p),
                m->gradient + d * p->cells * LANES, LANES, 0);
}

static void mix(const Pass *p, const Block *k, index_t samples, const Memory *m) {
    index_t step = kernel_step(p), row = p->rows * p->ranks;
    const float *alpha = p->alpha + k->first * p->rows * terms(p);
    for (index_t d = 0; d < k->depths; d++)
        if (!p->ranks)
            product(samples * p->rows, 2, p->cells, alpha, p->cells, 1, m->block + d * p->cells * LANES, LANES,
                    m->kernels + d * LANES, step, 0);
        else
            for (index_t r = 0; r < p->rows; r++)
                product(samples, 2, p->ranks, alpha + r * p->ranks, row, 1,
                        m->base + r * p->ranks * base_step(p) + d * LANES, base_step(p),
                        m->kernels + r * step + d * LANES, p->rows * step, 0);
}

/* The source of sample b and of group q, of those that the block has. */
static const float *source_of(const Pass *p, const Block *k, index_t b, index_t q) {
    return k->source + b * sample_size(p) + q * p->cell_groups * group_size(p);
}

static void mix_and_apply(const Pass *p, const Block *k, index_t samples, const Memory *m) {
    index_t step = kernel_step(p);
    mix(p, k, samples, m);
    for (index_t b = 0; b < samples; b++)
        for (index_t i = 0; i < lane_groups(p); i++) {
            index_t q = i / p->lane_groups, row = q * p->row_group + i % p->lane_groups * p->row_lane;
            for (index_t t = 0; t < p->tiles; t++)
                gather(p, p->tile + p->tile_start[t], source_of(p, k, b, q) + k->depth * p->source_positions, m->zeros,
                       k->depths, m->kernels + (b * p->rows + row) * step,
                       k->out + (b * lane_groups(p) + i) * p->out_positions * LANES, k->depth > 0);
        }
}

/* The gradient of the kernels of some samples, folded into those of alpha and of the cells. */
static void fold_into_cells(const Pass *p, const Block *k, index_t samples, const Memory *m, float *alpha_gradient,
                            int add) {
    index_t step = kernel_step(p), rows = samples * p->rows, width = padded(p->cells);
    if (alpha_gradient)
        for (index_t j = 0; j < p->cells; j += LANES)
            product(rows, p->cells - j > WIDTH ? 2 : 1, k->depths * LANES, m->kernels, step, 1,
                    m->turned + j * k->depths * LANES, LANES, alpha_gradient + k->first * p->rows * width + j, width,
                    1);
    if (p->cell_gradient)
        for (index_t d = 0; d < k->depths; d++)
            product(p->cells, 2, rows, p->alpha + k->first * p->rows * p->cells, 1, p->cells, m->kernels + d * LANES,
                    step, m->gradient + d * p->cells * LANES, LANES, add);
}

/* The same into those of alpha and of the bases. */
static void fold_into_bases(const Pass *p, const Block *k, index_t samples, const Memory *m, float *alpha_gradient,
                            int add) {
    index_t step = kernel_step(p), row = p->rows * p->ranks, width = padded(p->ranks);
    for (index_t r = 0; r < p->rows; r++) {
        const float *alpha = p->alpha + (k->first * p->rows + r) * p->ranks;
        for (index_t j = 0; alpha_gradient && j < p->ranks; j += LANES)
            product(samples, p->ranks - j > WIDTH ? 2 : 1, k->depths * LANES, m->kernels + r * step, p->rows * step, 1,
                    m->base_turned + (r * width + j) * base_step(p), LANES,
                    alpha_gradient + (k->first * p->rows + r) * width + j, p->rows * width, 1);
        for (index_t d = 0; d < k->depths; d++)
            product(p->ranks, 2, samples, alpha, 1, row, m->kernels + r * step + d * LANES, p->rows * step,
                    m->base_gradient + r * p->ranks * base_step(p) + d * LANES, base_step(p), add);
    }
}

static void differentiate(const Pass *p, const Block *k, index_t samples, const Memory *m, float *alpha_gradient,
                          int add) {
    index_t step = kernel_step(p);
    for (index_t b = 0; b < samples; b++)
        for (index_t i = 0; i < lane_groups(p); i++) {
            index_t q = i / p->lane_groups, row = q * p->row_group + i % p->lane_groups * p->row_lane;
            for (index_t h = 0; h < p->depth_groups; h++)
                for (const int32_t *s = p->span, *end = s + 4 * p->spans; s < end; s += 4)
                    outer(p->run + 4 * s[2], p->run + 4 * s[3],
                          source_of(p, k, b, q) + (h * p->depths + k->depth) * p->source_positions, k->depths,
                          k->other + (b * lane_groups(p) + i) * p->out_positions * LANES,
                          m->kernels + (b * p->rows + row + s[0] * p->row_tap + h * p->row_depth) * step, s[1]);
        }
    (p->ranks ? fold_into_bases : fold_into_cells)(p, k, samples, m, alpha_gradient, add);
}

/* Make a block of the cells ready, or of bases where those are not there yet. */
static void prepare(const Pass *p, index_t group, index_t lane, index_t lanes, index_t depth, index_t depths, Memory *m,
                    const float *alpha_gradient) {
    if (p->kept)
        m->base = p->kept + ((group * pieces(p->lanes, LANES) + lane / LANES) * pieces(p->depths, p->block_depths) +
                             depth / p->block_depths) *
                                bases(p) * base_step(p);
    if (p->kept && p->kept_filled) return;
    pack_cells(p, group, lane, lanes, depth, depths, m->block, LANES, p->cells * LANES);
    if (p->ranks) mix_bases(p, depths, m);
    if (!alpha_gradient) return;
    turn_cells(p, depths, m->block, m->turned);
    if (p->ranks) turn_bases(p, depths, m);
}

/* Where the channels of a group of lanes begin, of the groups of the convolution of which a block has part. */
static index_t channel_of(const Pass *p, index_t group, index_t i) {
    return ((i / p->lane_groups * p->cell_groups + group) * p->lane_groups + i % p->lane_groups) * p->lanes;
}

/* All depths of some lanes, for samples first to last of the batch; source holds theirs. */
static void run_lanes(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                      float *memory, float *alpha_gradient, float *cell_gradient, int add) {
    Memory own, *m = &own;
    lay_out(p, memory, m);
    index_t lanes = smaller(LANES, p->lanes - lane), map = p->out_positions * LANES;
    memset(m->zeros, 0, p->block_depths * sizeof(float));
    for (index_t b = first; p->other.data && b < last; b++)
        for (index_t i = 0; i < lane_groups(p); i++)
            read_map(&p->other, &p->other_sums, b, channel_of(p, group, i) + lane, lanes, p->out_positions, LANES,
                     m->mapped, m->other + ((b - first) * lane_groups(p) + i) * map);
    for (index_t depth = 0; depth < p->depths; depth += p->block_depths) {
        index_t depths = smaller(p->block_depths, p->depths - depth);
        Block k = {depth, depths, first, source + group * group_size(p), m->out, m->other};
        prepare(p, group, lane, lanes, depth, depths, m, alpha_gradient);
        while (k.first < last) {
            index_t samples = smaller(p->mixed_samples, last - k.first);
            if (p->out.data) mix_and_apply(p, &k, samples, m);
            if (p->other.data) differentiate(p, &k, samples, m, alpha_gradient, k.first > first);
            k.first += samples;
            k.source += samples * sample_size(p);
            k.out += samples * lane_groups(p) * map;
            k.other += samples * lane_groups(p) * map;
        }
        if (p->ranks && p->other.data)
            fold_bases(p, depths, m, alpha_gradient ? alpha_gradient + p->batch * p->rows * padded(p->ranks) : NULL);
        if (cell_gradient)
            unpack_cells(p, group, lane, lanes, depth, depths, m->gradient, LANES, p->cells * LANES, cell_gradient, add);
    }
    for (index_t b = first; p->out.data && b < last; b++)
        for (index_t i = 0; i < lane_groups(p); i++)
            write_map(p, b, channel_of(p, group, i) + lane, lanes, m->mapped,
                      m->out + ((b - first) * lane_groups(p) + i) * map);
}

void kw_mix_kernels(const Pass *p) { share_out(p, lay_out(p, NULL, &(Memory){0}), 1, run_lanes); }
