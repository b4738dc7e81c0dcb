/* Mix inputs: U[j] = sum over mixtures of alpha[mixture, j] * what the mixture reads, then one dense product over all
   cells, out = sum over j of E[j] * U[j]. No kernel is made, and all samples share the products: fewer sums on maps of
   few positions. A row is an output position of one sample and one group of output channels.

   Backwards, one thread has LANES input channels, for which it needs nothing of the others: dU[j] = E[j]' * dy gives
   the gradients of alpha and of the input, and U, made anew, that of E. */

#include "pass.h"

/* Mixtures that a row takes, forward. */
static index_t joined(const Pass *p) { return p->taps * p->depth_groups; }

/* Forward: lanes are output channels, depths input channels. */

/* Numbers of a row of U, whose last store goes past its end. */
static index_t row_step(const Pass *p) { return p->block_depths * p->cells + LANES; }
static index_t forward_rows(const Pass *p) { return p->read_samples * p->lane_groups * p->out_positions; }

static index_t forward_scratch(const Pass *p) { /* of one thread */
    return larger(joined(p) * (p->block_depths + padded(p->cells)), p->block_depths * p->cells * LANES);
}

index_t kw_mix_inputs_memory(const Pass *p) {
    return p->read_samples * sample_size(p) + forward_rows(p) * (row_step(p) + padded(p->lanes)) +
           p->threads * forward_scratch(p);
}

/* What the rows of one sample and group take of some depths, [positions][depths][cells]. */
static void mix_inputs(const Pass *p, const float *alpha, index_t group, const float *source, index_t depth,
                       index_t depths, float *scratch, float *rows) {
    index_t width = padded(p->cells), count = joined(p);
    float *weights = scratch, *read = scratch + count * width;
    memset(weights, 0, count * width * sizeof(float));
    for (index_t i = 0; i < count; i++) {
        index_t mixture = i / p->depth_groups * p->row_tap + group * p->row_lane + i % p->depth_groups * p->row_depth;
        memcpy(weights + i * width, alpha + mixture * p->cells, p->cells * sizeof(float));
    }
    for (index_t position = 0; position < p->out_positions; position++, rows += row_step(p)) {
        for (index_t i = 0; i < count; i++) {
            index_t from = p->reads[i / p->depth_groups * p->out_positions + position];
            const float *at = source + (i % p->depth_groups * p->depths + depth) * p->source_positions + from * depths;
            if (from < 0)
                memset(read + i * depths, 0, depths * sizeof(float));
            else
                memcpy(read + i * depths, at, depths * sizeof(float));
        }
        /* The last panel first: what it writes beyond the cells is written over. */
        for (index_t j = width - LANES; j >= 0; j -= LANES)
            product(depths, p->cells - j > WIDTH ? 2 : 1, count, read, 1, depths, weights + j, width, rows + j,
                    p->cells, 0);
    }
}

void kw_mix_inputs(const Pass *p) {
    index_t blocks = pieces(p->lanes, LANES), items = blocks * p->parts;
    float *source = p->memory, *mixed = source + p->read_samples * sample_size(p);
    float *out = mixed + forward_rows(p) * row_step(p), *scratch = out + forward_rows(p) * padded(p->lanes);
    for (index_t first = 0; first < p->batch; first += p->read_samples) {
        index_t samples = smaller(p->read_samples, p->batch - first), groups = samples * p->lane_groups;
        index_t rows = groups * p->out_positions;
        read_source(p, first, samples, source, scratch, forward_scratch(p));
        for (index_t depth = 0; depth < p->depths; depth += p->block_depths) {
            index_t depths = smaller(p->block_depths, p->depths - depth);
#pragma omp parallel num_threads(p->threads)
            {
#pragma omp for schedule(static)
                for (index_t thread = 0; thread < p->threads; thread++)
                    for (index_t i = groups * thread / p->threads; i < groups * (thread + 1) / p->threads; i++) {
                        index_t b = i / p->lane_groups, group = i % p->lane_groups;
                        mix_inputs(p, p->alpha + (first + b) * p->rows * p->cells, group, source + b * sample_size(p),
                                   depth, depths, scratch + thread * forward_scratch(p),
                                   mixed + i * p->out_positions * row_step(p));
                    }
#pragma omp for schedule(static)
                for (index_t thread = 0; thread < p->threads; thread++)
                    for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
                        index_t lane = i / p->parts * LANES, lanes = smaller(LANES, p->lanes - lane);
                        index_t from = rows * (i % p->parts) / p->parts, to = rows * (i % p->parts + 1) / p->parts;
                        float *block = scratch + thread * forward_scratch(p);
                        pack_cells(p, 0, lane, lanes, depth, depths, block, LANES, p->cells * LANES);
                        product(to - from, 2, depths * p->cells, mixed + from * row_step(p), row_step(p), 1, block,
                                LANES, out + (i / p->parts * rows + from) * LANES, LANES, depth > 0);
                    }
            }
        }
#pragma omp parallel for schedule(static) num_threads(p->threads)
        for (index_t i = 0; i < blocks * groups; i++) {
            index_t lane = i / groups * LANES, group = i % p->lane_groups, b = i % groups / p->lane_groups;
            write_map(p, first + b, group * p->lanes + lane, smaller(LANES, p->lanes - lane), NULL,
                      out + i * p->out_positions * LANES);
        }
    }
}

/* Backward: lanes are input channels, depths output channels; source is the output's gradient, other the input. */

typedef struct {
    float *out, *other, *block, *gradient, *mixed, *mixed_gradient, *read, *turned, *weights, *result, *cell;
} Memory;

/* Mixtures that a row takes, backward. */
static index_t taken(const Pass *p) { return p->taps * p->lane_groups; }
/* Numbers of a row of U and dU; no power of two, so that rows share no set of the cache. */
static index_t mixed_step(const Pass *p) { return (p->cells + 1) * LANES; }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    index_t block = p->cells * p->depths * LANES, each = pieces(p->read_samples, p->parts) * p->lane_groups;
    index_t mixed = p->mixed_samples * p->depth_groups * p->source_positions * mixed_step(p), width = padded(p->cells);
    m->out = at, at += each * p->out_positions * LANES;
    m->other = at, at += each * p->out_positions * LANES;
    m->block = at, at += block;
    m->gradient = at, at += block;
    m->mixed = at, at += mixed;
    m->mixed_gradient = at, at += mixed;
    m->read = at, at += taken(p) * LANES;
    m->turned = at, at += width * LANES;
    m->weights = at, at += taken(p) * p->cells;
    m->result = at, at += taken(p) * larger(width, LANES);
    return padded(at - start);
}

index_t kw_mix_inputs_backward_memory(const Pass *p) {
    return p->read_samples * sample_size(p) + p->threads * lay_out(p, NULL, &(Memory){0});
}

/* The gradients that pass through one row; `mixture` and `place` say what it takes. */
static void differentiate_row(const Pass *p, const Memory *m, index_t count, const index_t *mixture,
                              const index_t *place, const float *alpha, const float *mixed_gradient, float *mixed,
                              const float *other, float *out, float *alpha_gradient) {
    index_t width = padded(p->cells);
    for (index_t i = 0; i < count; i++) {
        memcpy(m->weights + i * p->cells, alpha + mixture[i] * p->cells, p->cells * sizeof(float));
        memcpy(m->read + i * LANES, other + place[i], LANES * sizeof(float));
    }
    if (p->cell_gradient) product(p->cells, 2, count, m->weights, 1, p->cells, m->read, LANES, mixed, LANES, 0);
    if (alpha_gradient) {
        for (index_t j = 0; j < p->cells; j += LANES) {
            index_t cells = smaller(LANES, p->cells - j);
            if (cells < LANES) memset(m->turned, 0, LANES * LANES * sizeof(float));
            arrange(mixed_gradient + j * LANES, 1, LANES, m->turned, LANES, LANES, cells);
            product(count, 2, LANES, m->read, LANES, 1, m->turned, LANES, m->result + j, width, 0);
        }
        for (index_t i = 0; i < count; i++)
            for (index_t j = 0; j < width; j++) alpha_gradient[mixture[i] * width + j] += m->result[i * width + j];
    }
    if (p->out.data) {
        product(count, 2, p->cells, m->weights, p->cells, 1, mixed_gradient, LANES, m->result, LANES, 0);
        for (index_t i = 0; i < count; i++)
            for (index_t l = 0; l < LANES; l++) out[place[i] + l] += m->result[i * LANES + l];
    }
}

/* Samples whose mixed inputs fit the cache together, from the first of the thread's on. */
static void differentiate(const Pass *p, const Memory *m, index_t samples, const float *source, const float *alpha,
                          const float *other, float *out, float *alpha_gradient, int add) {
    index_t positions = p->source_positions, rows = samples * p->depth_groups * positions, step = mixed_step(p);
    index_t map = p->out_positions * LANES, mixture[taken(p)], place[taken(p)];
    for (index_t j = 0; j < p->cells && (p->out.data || alpha_gradient); j++)
        product(rows, 2, p->depths, source, p->depths, 1, m->block + j * p->depths * LANES, LANES,
                m->mixed_gradient + j * LANES, step, 0);
    for (index_t row = 0; row < rows; row++) {
        index_t position = row % positions, h = row / positions % p->depth_groups;
        index_t b = row / positions / p->depth_groups, count = 0;
        for (index_t t = 0; t < p->taps; t++)
            for (index_t g = 0; g < p->lane_groups; g++) {
                index_t read = p->reads[t * positions + position];
                if (read < 0) continue;
                mixture[count] = t * p->row_tap + g * p->row_lane + h * p->row_depth;
                place[count++] = (b * p->lane_groups + g) * map + read * LANES;
            }
        differentiate_row(p, m, count, mixture, place, alpha + b * p->rows * p->cells, m->mixed_gradient + row * step,
                          m->mixed + row * step, other, out,
                          alpha_gradient ? alpha_gradient + b * p->rows * padded(p->cells) : NULL);
    }
    for (index_t j = 0; j < p->cells && p->cell_gradient; j++)
        product(p->depths, 2, rows, source, 1, p->depths, m->mixed + j * LANES, step,
                m->gradient + j * p->depths * LANES, LANES, add);
}

static void run_lanes(const Pass *p, index_t group, index_t lane, index_t first, index_t last, const float *source,
                      float *memory, float *alpha_gradient, float *cell_gradient, int add) {
    Memory own, *m = &own;
    lay_out(p, memory, m);
    index_t lanes = smaller(LANES, p->lanes - lane), map = p->out_positions * LANES, width = padded(p->cells);
    pack_cells(p, group, lane, lanes, 0, p->depths, m->block, p->depths * LANES, LANES);
    memset(m->out, 0, (last - first) * p->lane_groups * map * sizeof(float));
    for (index_t b = first; b < last; b++)
        for (index_t g = 0; g < p->lane_groups; g++)
            read_map(&p->other, &p->other_sums, b, g * p->lanes + lane, lanes, p->out_positions, LANES, NULL,
                     m->other + ((b - first) * p->lane_groups + g) * map);
    for (index_t b = first; b < last; b += p->mixed_samples) {
        index_t skip = (b - first) * p->lane_groups * map;
        differentiate(p, m, smaller(p->mixed_samples, last - b), source + (b - first) * sample_size(p),
                      p->alpha + b * p->rows * p->cells, m->other + skip, m->out + skip,
                      alpha_gradient ? alpha_gradient + b * p->rows * width : NULL, b > first);
    }
    if (cell_gradient)
        unpack_cells(p, group, lane, lanes, 0, p->depths, m->gradient, p->depths * LANES, LANES, cell_gradient, add);
    for (index_t b = first; p->out.data && b < last; b++)
        for (index_t g = 0; g < p->lane_groups; g++)
            write_map(p, b, g * p->lanes + lane, lanes, NULL, m->out + ((b - first) * p->lane_groups + g) * map);
}

void kw_mix_inputs_backward(const Pass *p) { share_out(p, lay_out(p, NULL, &(Memory){0}), 1, run_lanes); }
