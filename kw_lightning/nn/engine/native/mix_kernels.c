/* Mix kernels block by block in the cache, use them and forget them: no sample's kernel is ever whole in memory.

   One pass computes, for every sample b and group g of lanes,

       out[b, p, g, l] = sum over taps t, groups h of depths and depths d of
                         source[b, reads(t, p), h, d] * W[b, (t, g, h)][d, l],
       W[b, r] = sum over j of alpha[b, r, j] * E[j],

   and that for each group of a grouped convolution.

   Lanes l and depths d are the two channel axes of a cell: output and input channels in the forward pass, input and
   output channels for the gradient of the input. A block is some lanes, which fill one or two vectors, by some depths
   of every cell. It is packed once; from it the kernels of all samples are mixed and applied. Backwards they are
   replaced by their gradient, which is folded into those of alpha and E at once. If a map is larger than the kernels,
   kernels of all depths are mixed before any is applied, so that no partial output goes to memory and back.

   For few kernels of many cells, packing the cells would be most of the work. Then kernels are mixed from the cells as
   they lie, and the kernels are transposed into blocks instead of the cells (`direct`).

   Winograd's form of a 3x3 convolution is the same pass between the transformed positions of windows of the maps
   (winograd.h): a sample's kernel is transformed before it is applied, and its gradient before it is folded.

   Along the attention's rank, a mixture is made of a few bases of its own, which are mixtures of the cells:

       W[b, r] = sum over k of alpha[b, r, k] * B[r, k],  B[r, k] = sum over j of base[r, k, j] * E[j].

   The bases of a block are mixed before the kernels, once for all samples, and are not written to memory either, unless
   they are to be kept. Backwards, their gradient is summed over the samples, then folded into those of base and E. */

#include "pass.h"

/* Cells whose lanes stay in the first-level cache while all bases are mixed from them. */
#define CELLS 128

/* For kernels mixed from cells as they lie: lanes that are transposed together, cells that are added at once, and
   numbers of the sums of all mixtures, which stay in the first-level cache beside these cells. */
#define TURNED 4
#define LYING_CELLS 8
#define LYING_SUMS 4096

/* The memory of one thread. */
typedef struct {
    float *mapped, *out, *other, *block, *turned, *gradient, *kernels, *transformed, *zeros;
    float *base, *base_turned, *base_gradient, *lying;
} Memory;

/* Numbers from mixture to mixture; no power of two, so that mixtures do not share a set of the cache. */
static index_t kernel_step(const Pass *p) { return (p->kernel_depths + 1) * block_lanes(p); }

/* Numbers of a sample's transformed kernels. */
static index_t transformed_size(const Pass *p) {
    return p->source_windows.dimensions ? p->taps * p->row_tap * kernel_step(p) : 0;
}

/* Groups of lanes whose kernels are mixed from the same block, in all groups of the convolution that it serves. */
static index_t lane_groups(const Pass *p) { return p->groups * p->lane_groups; }

/* Numbers of a group's source in one sample. */
static index_t group_size(const Pass *p) { return p->source_positions * group_depths(p); }

/* Numbers of a basis in a block. */
static index_t base_step(const Pass *p) { return p->block_depths * block_lanes(p); }

/* Numbers from mixture to mixture of TURNED lanes as they lie; no power of two either. */
static index_t lying_step(const Pass *p) { return TURNED * p->block_depths + LANES; }

/* Whether kernels have all depths: applying them once completes an output, which is then written. */
static int whole(const Pass *p) { return p->kernel_depths == p->depths; }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    index_t lanes = block_lanes(p), block = p->direct ? 0 : p->block_depths * p->cells * lanes;
    index_t each = pieces(p->read_samples, p->parts) * lane_groups(p);
    int kernels = p->other.data != NULL;
    m->mapped = at, at += larger(p->source.positions, p->out.positions) * larger(p->tile_depths, lanes);
    m->out = at, at += p->out.data ? (whole(p) ? 1 : each) * p->out_positions * lanes : 0;
    m->other = at, at += kernels ? each * p->out_positions * lanes : 0;
    m->block = at, at += block;
    m->lying = at, at += p->direct ? p->mixed_samples * p->rows * lying_step(p) : 0;
    m->gradient = at, at += kernels ? MOST_ROWS(p->vectors) * lanes : 0;
    m->turned = at, at += kernels ? p->block_depths * lanes * padded(p->cells) : 0;
    m->kernels = at, at += p->mixed_samples * p->rows * kernel_step(p);
    m->transformed = at, at += transformed_size(p);
    m->zeros = at, at += p->tile_depths;
    m->base = at, at += p->kept ? 0 : bases(p) * base_step(p);
    m->base_gradient = at, at += kernels ? bases(p) * base_step(p) : 0;
    m->base_turned = at, at += kernels ? p->rows * padded(p->ranks) * base_step(p) : 0;
    return padded(at - start);
}

index_t kw_lanes(void) { return LANES; }
index_t kw_rows(index_t vectors) { return MOST_ROWS(vectors); }

index_t kw_mix_kernels_memory(const Pass *p) {
    return p->read_samples * sample_size(p) + p->threads * lay_out(p, NULL, &(Memory){0});
}

/* One tile of output positions. */
INLINE void gather_rows(const int rows, const int vectors, const Pass *p, const int32_t *tile, const float *source,
                        const float *zeros, index_t depths, const float *kernels, float *out, int add) {
    vector sum[NARROW_ROWS][2];
    const int32_t *position = tile + 2, *tap = position + rows;
    const index_t lanes = vectors * WIDTH;
    EACH_ROW(rows) {
        const float *c = out + (index_t)position[r] * lanes;
        sum[r][0] = add ? LOAD(c) : (vector){0};
        sum[r][1] = add && vectors > 1 ? LOAD(c + WIDTH) : (vector){0};
    }
    for (index_t t = 0; t < tile[1]; t++, tap += 1 + rows)
        for (index_t h = 0; h < p->depth_groups; h++) {
            const float *a[NARROW_ROWS], *from = source + h * p->source_positions * p->depths;
            const float *b = kernels + (tap[0] * p->row_tap + h * p->row_depth) * kernel_step(p);
            EACH_ROW(rows) a[r] = tap[1 + r] < 0 ? zeros : from + (index_t)tap[1 + r] * depths;
            /* In Winograd's form the next tile reads the rows after these, and maps are too large for near caches. */
            if (p->source_windows.dimensions) fetch(a[0] + rows * depths, rows * depths);
            for (index_t d = 0; d < depths; d++, b += lanes) {
                vector b0 = LOAD(b), b1 = vectors > 1 ? LOAD(b + WIDTH) : b0;
                EACH_ROW(rows) {
                    sum[r][0] += a[r][d] * b0;
                    if (vectors > 1) sum[r][1] += a[r][d] * b1;
                }
            }
        }
    EACH_ROW(rows) {
        float *c = out + (index_t)position[r] * lanes;
        STORE(c, sum[r][0]);
        if (vectors > 1) STORE(c + WIDTH, sum[r][1]);
    }
}

static void gather(const Pass *p, const int32_t *tile, const float *source, const float *zeros, index_t depths,
                   const float *kernels, float *out, int add) {
    switch (2 * tile[0] + (p->vectors > 1)) {
#define CASE(N)                                                               \
    case 2 * N:                                                               \
        gather_rows(N, 1, p, tile, source, zeros, depths, kernels, out, add); \
        break;
        EACH_NARROW_COUNT(CASE)
#undef CASE
#define CASE(N)                                                               \
    case 2 * N + 1:                                                           \
        gather_rows(N, 2, p, tile, source, zeros, depths, kernels, out, add); \
        break;
        EACH_COUNT(CASE)
#undef CASE
    }
}

/* Some depths of one mixture's gradient: the sum over runs of positions of source times other. */
INLINE void outer_rows(const int rows, const int vectors, const int32_t *run, const int32_t *end, const float *source,
                       index_t depths, const float *other, float *c, int add) {
    vector sum[NARROW_ROWS][2];
    const index_t lanes = vectors * WIDTH;
    EACH_ROW(rows) {
        sum[r][0] = add ? LOAD(c + r * lanes) : (vector){0};
        sum[r][1] = add && vectors > 1 ? LOAD(c + r * lanes + WIDTH) : (vector){0};
    }
    for (; run < end; run += 4) {
        const float *a = source + run[0] * depths, *b = other + (index_t)run[1] * lanes;
        for (index_t k = run[3], step = (index_t)run[2] * lanes; k > 0; k--, a += depths, b += step) {
            vector b0 = LOAD(b), b1 = vectors > 1 ? LOAD(b + WIDTH) : b0;
            EACH_ROW(rows) {
                sum[r][0] += a[r] * b0;
                if (vectors > 1) sum[r][1] += a[r] * b1;
            }
        }
    }
    EACH_ROW(rows) {
        STORE(c + r * lanes, sum[r][0]);
        if (vectors > 1) STORE(c + r * lanes + WIDTH, sum[r][1]);
    }
}

static void outer(index_t vectors, const int32_t *run, const int32_t *end, const float *source, index_t depths,
                  const float *other, float *c, int add) {
    for (index_t tiles = pieces(depths, MOST_ROWS(vectors)), first = 0; tiles > 0; tiles--) {
        index_t count = (depths - first) / tiles;
        const float *from = source + first;
        float *to = c + first * vectors * WIDTH;
        first += count;
        switch (2 * count + (vectors > 1)) {
#define CASE(N)                                                   \
    case 2 * N:                                                   \
        outer_rows(N, 1, run, end, from, depths, other, to, add); \
        break;
            EACH_NARROW_COUNT(CASE)
#undef CASE
#define CASE(N)                                                   \
    case 2 * N + 1:                                               \
        outer_rows(N, 2, run, end, from, depths, other, to, add); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

/* One block of the cells, and the samples for which its kernels are mixed. */
typedef struct {
    index_t group, lane, lanes, depth, depths;
    index_t first;       /* of these samples, in the batch */
    const float *source; /* of that sample */
    float *out, *other;  /* of that sample */
} Block;

/* Write a block's part of E's gradient in place, or add to it: the sum over rows of a[row, cell] * b[row, d, l]. Lines
   of neighbouring cells may share a set of the cache, so few cells are taken at a time, line by line, and their next
   lines are prefetched meanwhile. */
static void fold_into_gradient(const Pass *p, const Block *k, index_t rows, const float *a, const float *b,
                               index_t b_step, const Memory *m, float *cell_gradient, int add) {
    index_t lanes = block_lanes(p), place = k->group * p->group_step + k->depth * p->depth_step + k->lane;
    for (index_t tiles = pieces(p->cells, MOST_ROWS(p->vectors)), first = 0; tiles > 0; tiles--) {
        index_t count = (p->cells - first) / tiles;
        float *cell = cell_gradient + first * p->cell_step + place;
        for (index_t d = 0; d < k->depths; d++) {
            float *line = cell + d * p->depth_step;
            const float *next = d + 1 < k->depths ? line + p->depth_step : cell + count * p->cell_step;
            for (index_t j = 0; j < count; j++) fetch(next + j * p->cell_step, k->lanes);
            if (k->lanes == lanes) {
                product(count, p->vectors, rows, a + first, 1, p->cells, b + d * lanes, b_step, line, p->cell_step,
                        add);
                continue;
            }
            product(count, p->vectors, rows, a + first, 1, p->cells, b + d * lanes, b_step, m->gradient, lanes, 0);
            for (index_t j = 0; j < count; j++, line += p->cell_step)
                for (index_t l = 0; l < k->lanes; l++) line[l] = m->gradient[j * lanes + l] + (add ? line[l] : 0);
        }
        first += count;
    }
}

/* Mix the bases of a block, from CELLS cells at a time, which stay in the first-level cache. */
static void mix_bases(const Pass *p, index_t depths, const Memory *m) {
    index_t lanes = block_lanes(p);
    for (index_t d = 0; d < depths; d++)
        for (index_t j = 0; j < p->cells; j += CELLS)
            product(bases(p), p->vectors, smaller(CELLS, p->cells - j), p->base + j, p->cells, 1,
                    m->block + (d * p->cells + j) * lanes, lanes, m->base + d * lanes, base_step(p), j > 0);
}

/* turned[mixture][panel of LANES bases][d, l][basis], as turn_cells does. */
static void turn_bases(const Pass *p, index_t depths, const Memory *m) {
    index_t lanes = block_lanes(p);
    for (index_t r = 0; r < p->rows; r++)
        for (index_t j = 0; j < p->ranks; j += LANES) {
            index_t count = smaller(LANES, p->ranks - j);
            float *panel = m->base_turned + (r * padded(p->ranks) + j) * base_step(p);
            if (count < LANES) memset(panel, 0, depths * lanes * LANES * sizeof(float));
            for (index_t d = 0; d < depths; d++)
                arrange(m->base + (r * p->ranks + j) * base_step(p) + d * lanes, 1, base_step(p),
                        panel + d * lanes * LANES, LANES, lanes, count);
        }
}

/* Fold a block's gradient of the bases into those of base and E. */
static void fold_bases(const Pass *p, const Block *k, const Memory *m, float *base_gradient, float *cell_gradient,
                       int add) {
    index_t width = padded(p->cells), size = k->depths * block_lanes(p);
    for (index_t j = 0; base_gradient && j < p->cells; j += LANES)
        product(bases(p), p->cells - j > WIDTH ? 2 : 1, size, m->base_gradient, base_step(p), 1, m->turned + j * size,
                LANES, base_gradient + j, width, 1);
    if (cell_gradient)
        fold_into_gradient(p, k, bases(p), p->base, m->base_gradient, base_step(p), m, cell_gradient, add);
}

/* kernels[r][d][l] = sum over j of alpha[r][j] * E[j][l][d], from cells as they lie, each read once, line by line. */
static void mix_lying(const Pass *p, const Block *k, index_t rows, const float *alpha, const Memory *m) {
    /* If a block has all depths, TURNED lanes are one contiguous line. */
    index_t lanes = block_lanes(p), joined = k->depths == p->lane_step ? TURNED : 1, line = joined * k->depths;
    index_t run = larger(LYING_SUMS / rows / LANES, 1) * LANES;
    if (k->lanes < lanes) memset(m->kernels, 0, rows * kernel_step(p) * sizeof(float));
    for (index_t l = 0; l < k->lanes; l++) {
        const float *cell = p->cell + k->group * p->group_step + (k->lane + l) * p->lane_step + k->depth;
        float *sums = m->lying + l % TURNED * k->depths;
        for (index_t first = 0; l % joined == 0 && first < line; first += run)
            for (index_t j = 0; j < p->cells; j += LYING_CELLS) {
                index_t count = smaller(LYING_CELLS, p->cells - j), next = j + count < p->cells ? j + count : 0;
                for (index_t at = first; at < smaller(first + run, line); at += LANES) {
                    /* Runs are short and cells far apart: the hardware does not prefetch the next ones. */
                    const float *ahead = cell + next * p->cell_step + at + (next ? 0 : run);
                    for (index_t c = 0; c < smaller(LYING_CELLS, p->cells - next); c++)
                        fetch(ahead + c * p->cell_step, LANES);
                    product(rows, 2, count, alpha + j, p->cells, 1, cell + j * p->cell_step + at, p->cell_step,
                            sums + at, lying_step(p), j > 0);
                }
            }
        for (index_t r = 0; l % TURNED == TURNED - 1 && r < rows; r++)
            arrange(m->lying + r * lying_step(p), 1, k->depths, m->kernels + r * kernel_step(p) + l + 1 - TURNED, lanes,
                    k->depths, TURNED);
    }
}

/* Mix depth d of mixture r of some samples from its bases. Kept bases are read from memory: with every tile of samples
   an equal part of the next block is prefetched. */
static void mix_of_bases(const Pass *p, const Block *k, index_t d, index_t r, index_t samples, const float *alpha,
                         float *kernels, const Memory *m) {
    index_t step = kernel_step(p), row = p->rows * p->ranks, lanes = block_lanes(p), tile = MOST_ROWS(p->vectors);
    index_t numbers = row * base_step(p), tiles = pieces(samples, tile), all = k->depths * p->rows * tiles;
    for (index_t t = 0, part = (d * p->rows + r) * tiles; t < tiles; t++, part++) {
        index_t first = samples * t / tiles, last = samples * (t + 1) / tiles;
        if (p->kept_filled)
            fetch(m->base + numbers + numbers * part / all, numbers * (part + 1) / all - numbers * part / all);
        product(last - first, p->vectors, p->ranks, alpha + first * row + r * p->ranks, row, 1,
                m->base + r * p->ranks * base_step(p) + d * lanes, base_step(p),
                kernels + (first * p->rows + r) * step + d * lanes, p->rows * step, 0);
    }
}

/* Mix a block's part of the kernels of some samples; the kernels in `m` begin at depth `from`. */
static void mix(const Pass *p, const Block *k, index_t from, index_t samples, const Memory *m) {
    index_t step = kernel_step(p), lanes = block_lanes(p);
    float *kernels = m->kernels + (k->depth - from) * lanes;
    const float *alpha = p->alpha + k->first * p->rows * terms(p);
    if (p->direct) {
        mix_lying(p, k, samples * p->rows, alpha, m);
        return;
    }
    for (index_t d = 0; d < k->depths; d++)
        if (!p->ranks)
            product(samples * p->rows, p->vectors, p->cells, alpha, p->cells, 1, m->block + d * p->cells * lanes, lanes,
                    kernels + d * lanes, step, 0);
        else
            for (index_t r = 0; r < p->rows; r++) mix_of_bases(p, k, d, r, samples, alpha, kernels, m);
}

/* Transform the kernels of sample b of the mixed ones; with `back`, turn the transformed ones' gradient into theirs. */
static void transform(const Pass *p, const Block *k, index_t b, int back, const Memory *m) {
    index_t step = kernel_step(p), tap = p->row_tap * step;
    for (index_t r = 0; r < p->row_tap; r++)
        transform_kernel(p->source_windows.dimensions, back, m->kernels + (b * p->rows + r) * step, tap,
                         m->transformed + r * step, tap, k->depths * block_lanes(p));
}

/* The kernels of sample b as they are applied, or their gradient. */
static float *kernels_of(const Pass *p, index_t b, const Memory *m) {
    return transformed_size(p) ? m->transformed : m->kernels + b * p->rows * kernel_step(p);
}

/* The source of sample b, in the q-th of the block's groups. */
static const float *source_of(const Pass *p, const Block *k, index_t b, index_t q) {
    return k->source + b * sample_size(p) + q * p->cell_groups * group_size(p);
}

/* The first channel of the i-th group of lanes for which a block mixes kernels; the block is of `group` in a cell. */
static index_t channel_of(const Pass *p, index_t group, index_t i) {
    return ((i / p->lane_groups * p->cell_groups + group) * p->lane_groups + i % p->lane_groups) * p->lanes;
}

/* Write the map of a sample, in the i-th group of lanes. */
static void write_out(const Pass *p, const Block *k, index_t sample, index_t i, const Memory *m, const float *out) {
    write_map(p, sample, channel_of(p, k->group, i) + k->lane, k->lanes, m->mapped, out);
}

static void apply(const Pass *p, const Block *k, index_t samples, const Memory *m) {
    index_t step = kernel_step(p), map = p->out_positions * block_lanes(p);
    for (index_t b = 0; b < samples; b++) {
        if (transformed_size(p)) transform(p, k, b, 0, m);
        const float *own = kernels_of(p, b, m);
        for (index_t i = 0; i < lane_groups(p); i++) {
            index_t q = i / p->lane_groups, row = q * p->row_group + i % p->lane_groups * p->row_lane;
            float *out = whole(p) ? m->out : k->out + (b * lane_groups(p) + i) * map;
            const float *source = source_of(p, k, b, q), *kernels = own + row * step;
            for (index_t d = 0; d < k->depths; d += p->tile_depths) {
                index_t depths = smaller(p->tile_depths, k->depths - d);
                const float *from = source + (k->depth + d) * p->source_positions, *next = from + sample_size(p);
                /* Each tile prefetches an equal part of the next sample's source; Winograd's prefetch their own. */
                index_t numbers = p->source_windows.dimensions ? 0 : p->source_positions * depths;
                for (index_t t = 0; t < p->tiles; t++) {
                    fetch(next + numbers * t / p->tiles, numbers / p->tiles);
                    gather(p, p->tile + p->tile_start[t], from, m->zeros, depths, kernels + d * block_lanes(p), out,
                           k->depth + d > 0);
                }
            }
            if (whole(p)) write_out(p, k, k->first + b, i, m, out);
        }
    }
}

/* Fold a block's part of the gradient of some samples' kernels into those of alpha and of the cells. */
static void fold_into_cells(const Pass *p, const Block *k, index_t samples, const float *kernels, const Memory *m,
                            float *alpha_gradient, float *cell_gradient, int add) {
    index_t step = kernel_step(p), rows = samples * p->rows, width = padded(p->cells),
            size = k->depths * block_lanes(p);
    for (index_t j = 0; alpha_gradient && j < p->cells; j += LANES)
        product(rows, p->cells - j > WIDTH ? 2 : 1, size, kernels, step, 1, m->turned + j * size, LANES,
                alpha_gradient + k->first * p->rows * width + j, width, 1);
    if (cell_gradient)
        fold_into_gradient(p, k, rows, p->alpha + k->first * p->rows * p->cells, kernels, step, m, cell_gradient, add);
}

/* The same into those of alpha and of the bases. */
static void fold_into_bases(const Pass *p, const Block *k, index_t samples, const float *kernels, const Memory *m,
                            float *alpha_gradient, int add) {
    index_t step = kernel_step(p), row = p->rows * p->ranks, width = padded(p->ranks), lanes = block_lanes(p);
    for (index_t r = 0; r < p->rows; r++) {
        const float *alpha = p->alpha + (k->first * p->rows + r) * p->ranks;
        for (index_t j = 0; alpha_gradient && j < p->ranks; j += LANES)
            product(samples, p->ranks - j > WIDTH ? 2 : 1, k->depths * lanes, kernels + r * step, p->rows * step, 1,
                    m->base_turned + (r * width + j) * base_step(p), LANES,
                    alpha_gradient + (k->first * p->rows + r) * width + j, p->rows * width, 1);
        for (index_t d = 0; d < k->depths; d++)
            product(p->ranks, p->vectors, samples, alpha, 1, row, kernels + r * step + d * lanes, p->rows * step,
                    m->base_gradient + r * p->ranks * base_step(p) + d * lanes, base_step(p), add);
    }
}

/* Replace the kernels of some samples by their gradient. */
static void differentiate(const Pass *p, const Block *k, index_t samples, const Memory *m) {
    index_t step = kernel_step(p), lanes = block_lanes(p);
    for (index_t b = 0; b < samples; b++) {
        float *own = kernels_of(p, b, m);
        for (index_t i = 0; i < lane_groups(p); i++) {
            index_t q = i / p->lane_groups, row = q * p->row_group + i % p->lane_groups * p->row_lane;
            for (index_t h = 0; h < p->depth_groups; h++)
                for (index_t d = 0; d < k->depths; d += p->tile_depths)
                    for (const int32_t *s = p->span, *end = s + 4 * p->spans; s < end; s += 4)
                        outer(p->vectors, p->run + 4 * s[2], p->run + 4 * s[3],
                              source_of(p, k, b, q) + (h * p->depths + k->depth + d) * p->source_positions,
                              smaller(p->tile_depths, k->depths - d),
                              k->other + (b * lane_groups(p) + i) * p->out_positions * lanes,
                              own + (row + s[0] * p->row_tap + h * p->row_depth) * step + d * lanes, s[1]);
        }
        if (transformed_size(p)) transform(p, k, b, 1, m);
    }
}

/* Fold a block's part of that gradient; the kernels in `m` begin at depth `from`. `begun` says whether earlier samples
   of this block have been folded, `ends` whether these are the last. */
static void fold(const Pass *p, const Block *k, index_t from, index_t samples, const Memory *m, float *alpha_gradient,
                 float *cell_gradient, int add, int begun, int ends) {
    const float *kernels = m->kernels + (k->depth - from) * block_lanes(p);
    if (p->ranks)
        fold_into_bases(p, k, samples, kernels, m, alpha_gradient, begun);
    else
        fold_into_cells(p, k, samples, kernels, m, alpha_gradient, cell_gradient, add || begun);
    float *base_gradient = alpha_gradient ? alpha_gradient + p->batch * p->rows * padded(p->ranks) : NULL;
    if (p->ranks && ends) fold_bases(p, k, m, base_gradient, cell_gradient, add);
}

/* Where a block of kept bases lies. */
static float *kept_base(const Pass *p, const Block *k) {
    index_t lanes = block_lanes(p), block = k->group * pieces(p->lanes, lanes) + k->lane / lanes;
    return p->kept +
           (block * pieces(p->depths, p->block_depths) + k->depth / p->block_depths) * bases(p) * base_step(p);
}

/* Pack a block of the cells, and mix its bases; transpose both where alpha's gradient is wanted. */
static void prepare(const Pass *p, const Block *k, Memory *m, const float *alpha_gradient) {
    index_t lanes = block_lanes(p);
    if (p->kept) m->base = kept_base(p, k);
    if (p->direct || p->kept_filled) return;
    pack_cells(p, k->group, k->lane, k->lanes, k->depth, k->depths, m->block, lanes, p->cells * lanes);
    if (p->ranks) mix_bases(p, k->depths, m);
    if (!alpha_gradient) return;
    turn_cells(p, k->depths, m->block, m->turned);
    if (p->ranks) turn_bases(p, k->depths, m);
}

/* All depths of a block's lanes, for samples `first` to `last` of the batch, whose source is `source`. */
static void run_lanes(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                      float *memory, float *alpha_gradient, float *cell_gradient, int add) {
    Memory own, *m = &own;
    lay_out(p, memory, m);
    index_t width = block_lanes(p), lanes = smaller(width, p->lanes - lane), map = p->out_positions * width;
    memset(m->zeros, 0, p->tile_depths * sizeof(float));
    for (index_t b = first; p->other.data && b < last; b++)
        for (index_t i = 0; i < lane_groups(p); i++)
            read_map(&p->other, &p->other_windows, b, channel_of(p, group, i) + lane, lanes, width, m->mapped,
                     m->other + ((b - first) * lane_groups(p) + i) * map);
    for (index_t depth = 0; depth < p->depths; depth += p->kernel_depths) {
        index_t depths = smaller(p->kernel_depths, p->depths - depth);
        Block k = {group, lane, lanes, depth, depths, first, source + group * group_size(p), m->out, m->other};
        while (k.first < last) {
            index_t samples = smaller(p->mixed_samples, last - k.first);
            int several = p->block_depths < depths;
            int begun = k.first > first, ends = k.first + samples == last;
            for (Block part = k; p->out.data && part.depth < depth + depths; part.depth += p->block_depths) {
                part.depths = smaller(p->block_depths, depth + depths - part.depth);
                if (several || !begun) prepare(p, &part, m, several ? NULL : alpha_gradient);
                mix(p, &part, depth, samples, m);
            }
            if (p->out.data) apply(p, &k, samples, m);
            if (p->other.data) differentiate(p, &k, samples, m);
            for (Block part = k; p->other.data && part.depth < depth + depths; part.depth += p->block_depths) {
                part.depths = smaller(p->block_depths, depth + depths - part.depth);
                if (several ? alpha_gradient != NULL : !begun && !p->out.data) prepare(p, &part, m, alpha_gradient);
                fold(p, &part, depth, samples, m, alpha_gradient, cell_gradient, add, begun, ends);
            }
            k.first += samples;
            k.source += samples * sample_size(p);
            k.out += samples * lane_groups(p) * map;
            k.other += samples * lane_groups(p) * map;
        }
        if (depth + depths < p->depths || whole(p) || !p->out.data) continue;
        for (index_t b = first; b < last; b++)
            for (index_t i = 0; i < lane_groups(p); i++)
                write_out(p, &k, b, i, m, m->out + ((b - first) * lane_groups(p) + i) * map);
    }
}

/* Mix the bases that are to be kept: each block by one thread, before several read it. */
static void mix_kept_bases(const Pass *p, index_t memory) {
    index_t width = block_lanes(p), blocks = pieces(p->lanes, width), items = p->cell_groups * blocks;
    float *own = p->memory + p->read_samples * sample_size(p);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        Memory m;
        lay_out(p, own + thread * memory, &m);
        for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++)
            for (index_t depth = 0, lane = i % blocks * width; depth < p->depths; depth += p->block_depths) {
                Block k = {i / blocks, lane, smaller(width, p->lanes - lane), depth};
                k.depths = smaller(p->block_depths, p->depths - depth);
                prepare(p, &k, &m, NULL);
            }
    }
}

void kw_mix_kernels(const Pass *p) {
    Pass own = *p;
    index_t memory = lay_out(p, NULL, &(Memory){0});
    if (p->kept && !p->kept_filled) mix_kept_bases(p, memory);
    own.kept_filled = p->kept != NULL;
    share_out(&own, memory, 1, run_lanes);
}
