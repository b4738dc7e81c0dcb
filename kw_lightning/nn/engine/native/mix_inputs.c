/* Mix inputs: U[j] = sum over mixtures of alpha[mixture, j] * what the mixture reads, then one dense product over all
   cells, out = sum over j of E[j] * U[j]. No kernel is made, and all samples share the products, which takes fewer
   multiply-adds on maps of few positions. A row is an output position of one sample and one group of output channels.

   Backwards dU[j] = E[j]' * dy gives the gradients of alpha and of the input, and U, made again, that of E.

   A thread has cells of its own and reads them as they lie, one after the other. E is by far the largest tensor here:
   it is read, and its gradient written, once for every `mixed_samples`. The threads' parts of the output, or of the
   input's gradient, are added up at the end. */

#include "pass.h"

/* Lines of a cell that are used together, which stay in the second-level cache, and numbers of each, which stay in the
   first. */
#define LINES 32
#define RUN 256
/* Backwards, lines of a cell that are used together, LANES numbers of each, which stay in the first-level cache. */
#define TOGETHER 64

/* The inputs or the outputs of the convolution; a pass reads one and writes the other. */
typedef struct {
    index_t groups, channels, positions;
    index_t row;  /* rows of alpha from one group to the next */
    index_t size; /* numbers of a sample's map, [groups, positions, padded channels] */
} Side;

typedef struct {
    Side in, out;
} Sides;

static Side side(index_t groups, index_t channels, index_t positions, index_t row) {
    return (Side){groups, channels, positions, row, groups * positions * padded(channels)};
}

static Sides forward_sides(const Pass *p) {
    return (Sides){side(p->depth_groups, p->depths, p->source_positions, p->row_depth),
                   side(p->lane_groups, p->lanes, p->out_positions, p->row_lane)};
}

static Sides backward_sides(const Pass *p) {
    return (Sides){side(p->lane_groups, p->lanes, p->out_positions, p->row_lane),
                   side(p->depth_groups, p->depths, p->source_positions, p->row_depth)};
}

static index_t rows_of(const Sides *s, index_t samples) { return samples * s->out.groups * s->out.positions; }
/* Rows of the samples whose mixed inputs exist at once, and how many such chunks of samples there are. */
static index_t rows_at_once(const Pass *p, const Sides *s) { return padded(rows_of(s, p->mixed_samples)); }
static index_t chunks(const Pass *p) { return pieces(p->read_samples, p->mixed_samples); }
/* Numbers of a row of U and dU; no power of two, so that rows do not share a set of the cache. */
static index_t mixed_step(const Sides *s) { return padded(s->in.channels) + LANES; }

/* Lay out a map as [sample, group, position, channel], zero beyond the channels. */
static void read_maps(const Pass *p, const Map *map, const Side *s, index_t first, index_t samples, float *to) {
    index_t count = samples * s->groups, width = padded(s->channels);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < count; i++)
        read_map(map, &(Windows){0}, first + i / s->groups, i % s->groups * s->channels, s->channels, width, NULL,
                 to + i * s->positions * width);
}

/* Find the mixtures that a row of a sample takes, and where in the sample's map each reads; return how many. */
static index_t find_reads(const Pass *p, const Sides *s, index_t row, index_t *mixture, index_t *place) {
    index_t group = row / s->out.positions, position = row % s->out.positions, count = 0;
    for (index_t t = 0; t < p->taps; t++) {
        index_t read = p->reads[t * s->out.positions + position];
        for (index_t g = 0; read >= 0 && g < s->in.groups; g++) {
            mixture[count] = t * p->row_tap + group * s->out.row + g * s->in.row;
            place[count++] = (g * s->in.positions + read) * padded(s->in.channels);
        }
    }
    return count;
}

/* U of one cell for some samples, from `first` of the batch on, from their `maps`. The steps are from row to row of U,
   and from one panel of LANES channels to the next. */
static void mix_inputs(const Pass *p, const Sides *s, index_t cell, index_t first, index_t samples, const float *maps,
                       float *mixed, index_t row_step, index_t panel_step) {
    index_t mixture[p->taps * s->in.groups], place[p->taps * s->in.groups], rows = rows_of(s, 1);
    for (index_t i = 0; i < samples * rows; i++) {
        index_t count = find_reads(p, s, i % rows, mixture, place);
        const float *alpha = p->alpha + (first + i / rows) * p->rows * p->cells + cell;
        const float *map = maps + i / rows * s->in.size;
        for (index_t c = 0; c < s->in.channels; c += LANES) {
            vector low = {0}, high = {0};
            for (index_t k = 0; k < count; k++) {
                float weight = alpha[mixture[k] * p->cells];
                low += weight * LOAD(map + place[k] + c);
                high += weight * LOAD(map + place[k] + c + WIDTH);
            }
            float *to = mixed + i * row_step + c / LANES * panel_step;
            STORE(to, low);
            STORE(to + WIDTH, high);
        }
    }
}

/* Some numbers of a cell's lines, or of its gradient's, that are to be prefetched. */
typedef struct {
    const float *from;
    index_t step, lines, numbers;
} Ahead;

/* What is used after the `numbers` from `at` on of some lines: the next ones of these lines, or the first ones of the
   next lines, which may be the next cell's. */
static Ahead come_next(const float *cell, index_t step, index_t line, index_t lines, index_t at, index_t numbers,
                       index_t length) {
    at += numbers;
    if (at >= length) line += lines, at = 0;
    return (Ahead){cell + line * step + at, step, lines, smaller(numbers, length - at)};
}

/* Take one of `parts` equal parts off what is to be prefetched. */
static Ahead take_part(Ahead *all, index_t parts) {
    Ahead part = *all;
    part.lines /= parts;
    all->from += part.lines * all->step, all->lines -= part.lines;
    return part;
}

/* The product, which prefetches an equal part before each of its tiles: all at once would fill the queue of cache
   misses, in which the product's own reads then wait. */
static inline void product_fetching(index_t rows, int vectors, index_t length, const float *a, index_t a_row,
                                    index_t a_step, const float *b, index_t b_step, float *c, index_t c_row, int add,
                                    Ahead ahead) {
    for (index_t tiles = pieces(rows, MOST_ROWS(vectors)); tiles > 0; tiles--) {
        index_t count = rows / tiles;
        Ahead part = take_part(&ahead, tiles);
        for (; part.lines > 0; part.lines--, part.from += part.step) fetch(part.from, part.numbers);
        product(count, vectors, length, a, a_row, a_step, b, b_step, c, c_row, add);
        a += count * a_row, c += count * c_row, rows -= count;
    }
}

/* Forward: lanes are output channels, depths input channels. */

typedef struct {
    float *mixed;  /* U, [rows, channels] */
    float *turned; /* [panel of LANES rows][channel][row] */
    float *out;    /* [chunk][panel of LANES rows][channel][row] */
    float *written;
} Forward;

static index_t lay_out_forward(const Pass *p, const Sides *s, float *at, Forward *m) {
    float *start = at;
    index_t rows = rows_at_once(p, s);
    m->mixed = at, at += rows * mixed_step(s);
    m->turned = at, at += rows * p->depths;
    m->out = at, at += chunks(p) * rows * p->lanes;
    m->written = at, at += p->out_positions * LANES;
    return padded(at - start);
}

index_t kw_mix_inputs_memory(const Pass *p) {
    Sides s = forward_sides(p);
    return p->read_samples * s.in.size + p->threads * lay_out_forward(p, &s, NULL, &(Forward){0});
}

/* Add the product of one cell and its mixed inputs to `out`, for samples that fit the cache together. */
static void add_product(const Pass *p, const Sides *s, index_t cell, index_t first, index_t samples, const float *maps,
                        const Forward *m, float *out) {
    index_t rows = rows_of(s, samples), panels = pieces(rows, LANES);
    mix_inputs(p, s, cell, first, samples, maps, m->mixed, mixed_step(s), LANES);
    for (index_t panel = 0; panel < panels; panel++)
        arrange(m->mixed + panel * LANES * mixed_step(s), 1, mixed_step(s), m->turned + panel * p->depths * LANES,
                LANES, p->depths, smaller(LANES, rows - panel * LANES));
    for (index_t line = 0; line < p->lanes; line += LINES)
        for (index_t c = 0; c < p->depths; c += RUN) {
            index_t lines = smaller(LINES, p->lanes - line), run = smaller(RUN, p->depths - c);
            const float *whole = p->cell + cell * p->cell_step, *from = whole + line * p->lane_step + c;
            Ahead next = come_next(whole, p->lane_step, line, LINES, c, RUN, p->depths);
            for (index_t panel = 0; panel < panels; panel++)
                product_fetching(lines, rows - panel * LANES > WIDTH ? 2 : 1, run, from, p->lane_step, 1,
                                 m->turned + (panel * p->depths + c) * LANES, LANES,
                                 out + (panel * p->lanes + line) * LANES, LANES, 1, take_part(&next, panels - panel));
        }
}

/* Write some output channels of one sample, added up over the threads, whose memory begins at `own`. */
static void write_sum(const Pass *p, const Sides *s, index_t first, index_t b, index_t group, index_t lane,
                      const float *own, index_t memory, float *written) {
    Forward m;
    index_t lanes = smaller(LANES, p->lanes - lane);
    for (index_t position = 0; position < p->out_positions; position++)
        for (index_t l = 0; l < lanes; l++) {
            index_t row = (b % p->mixed_samples * p->lane_groups + group) * p->out_positions + position;
            index_t place = b / p->mixed_samples * rows_at_once(p, s) * p->lanes;
            place += (row / LANES * p->lanes + lane + l) * LANES + row % LANES;
            float sum = 0;
            for (index_t thread = 0; thread < p->threads; thread++) {
                lay_out_forward(p, s, (float *)own + thread * memory, &m);
                sum += m.out[place];
            }
            written[position * LANES + l] = sum;
        }
    write_map(p, first + b, group * p->lanes + lane, lanes, NULL, written);
}

void kw_mix_inputs(const Pass *p) {
    Sides s = forward_sides(p);
    index_t memory = lay_out_forward(p, &s, NULL, &(Forward){0}), blocks = pieces(p->lanes, LANES);
    float *maps = p->memory, *own = maps + p->read_samples * s.in.size;
    for (index_t first = 0; first < p->batch; first += p->read_samples) {
        index_t samples = smaller(p->read_samples, p->batch - first), items = samples * p->lane_groups * blocks;
        read_maps(p, &p->source, &s.in, first, samples, maps);
#pragma omp parallel num_threads(p->threads)
        {
#pragma omp for schedule(static)
            for (index_t thread = 0; thread < p->threads; thread++) {
                Forward m;
                lay_out_forward(p, &s, own + thread * memory, &m);
                memset(m.out, 0, chunks(p) * rows_at_once(p, &s) * p->lanes * sizeof(float));
                for (index_t j = p->cells * thread / p->threads; j < p->cells * (thread + 1) / p->threads; j++)
                    for (index_t b = 0; b < samples; b += p->mixed_samples)
                        add_product(p, &s, j, first + b, smaller(p->mixed_samples, samples - b), maps + b * s.in.size,
                                    &m, m.out + b / p->mixed_samples * rows_at_once(p, &s) * p->lanes);
            }
#pragma omp for schedule(static)
            for (index_t thread = 0; thread < p->threads; thread++) {
                Forward m;
                lay_out_forward(p, &s, own + thread * memory, &m);
                for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++)
                    write_sum(p, &s, first, i / blocks / p->lane_groups, i / blocks % p->lane_groups,
                              i % blocks * LANES, own, memory, m.written);
            }
        }
    }
}

/* Backward: lanes are input channels, depths output channels; source is the output's gradient, other the input. */

typedef struct {
    float *mixed; /* dU, then U, [panel of LANES channels][row][channel] */
    float *lines; /* [TOGETHER, LANES] of a cell, or of its gradient */
    float *in;    /* the input's gradient, as read_maps lays it */
    float *written;
} Backward;

/* Numbers of a panel; no power of two, so that panels do not share a set of the cache. */
static index_t panel_step(const Pass *p, const Sides *s) { return (rows_at_once(p, s) + 1) * LANES; }

static index_t lay_out_backward(const Pass *p, const Sides *s, float *at, Backward *m) {
    float *start = at;
    m->mixed = at, at += pieces(s->in.channels, LANES) * panel_step(p, s);
    m->lines = at, at += TOGETHER * LANES;
    m->in = at, at += p->read_samples * s->in.size;
    m->written = at, at += p->out_positions * LANES;
    return padded(at - start);
}

/* Numbers of the output's gradient in one chunk. */
static index_t chunk_size(const Pass *p, const Sides *s) {
    return pieces(p->depths, TOGETHER) * TOGETHER * rows_at_once(p, s);
}

/* Numbers of what all threads share: the input, and the output's gradient, in three layouts: as read_maps makes it; by
   TOGETHER channels, [chunk][panel of TOGETHER channels][row][channel]; and transposed, [chunk][channel][row]. */
static index_t shared(const Pass *p, const Sides *s) {
    return p->read_samples * (s->in.size + s->out.size) + 2 * chunks(p) * chunk_size(p, s);
}

index_t kw_mix_inputs_backward_memory(const Pass *p) {
    Sides s = backward_sides(p);
    return shared(p, &s) + p->threads * lay_out_backward(p, &s, NULL, &(Backward){0});
}

/* Add what dU of one cell contributes to the gradients of alpha and of the input. */
static void differentiate_inputs(const Pass *p, const Sides *s, index_t cell, index_t first, index_t samples,
                                 const float *maps, const float *mixed, float *in, float *alpha_gradient) {
    index_t mixture[p->taps * s->in.groups], place[p->taps * s->in.groups], rows = rows_of(s, 1);
    index_t panels = pieces(s->in.channels, LANES), step = panel_step(p, s);
    for (index_t i = 0; i < samples * rows; i++) {
        index_t count = find_reads(p, s, i % rows, mixture, place), row = (first + i / rows) * p->rows;
        const float *map = maps + i / rows * s->in.size, *gradient = mixed + i * LANES;
        float *of_map = in + i / rows * s->in.size;
        for (index_t k = 0; k < count; k++) {
            vector sum[2] = {{0}, {0}};
            float weight = p->alpha[(row + mixture[k]) * p->cells + cell], total = 0;
            for (index_t c = 0; alpha_gradient && c < panels; c++) {
                sum[0] += LOAD(map + place[k] + c * LANES) * LOAD(gradient + c * step);
                sum[1] += LOAD(map + place[k] + c * LANES + WIDTH) * LOAD(gradient + c * step + WIDTH);
            }
            for (int l = 0; l < WIDTH; l++) total += sum[0][l] + sum[1][l];
            if (alpha_gradient) alpha_gradient[(row + mixture[k]) * padded(p->cells) + cell] += total;
            float *to = of_map + place[k];
            for (index_t c = 0; p->out.data && c < panels; c++, to += LANES) {
                STORE(to, LOAD(to) + weight * LOAD(gradient + c * step));
                STORE(to + WIDTH, LOAD(to + WIDTH) + weight * LOAD(gradient + c * step + WIDTH));
            }
        }
    }
}

/* Copy `lanes` numbers of each of some lines of a cell into rows of LANES, filled up with zeros. */
static void take_lines(const float *from, index_t step, index_t lines, index_t lanes, float *to) {
    if (lanes < LANES) {
        memset(to, 0, lines * LANES * sizeof(float));
        arrange(from, step, 1, to, LANES, lines, lanes);
        return;
    }
    for (index_t i = 0; i < lines; i++, from += step, to += LANES) {
        STORE(to, LOAD(from));
        STORE(to + WIDTH, LOAD(from + WIDTH));
    }
}

/* dU of one cell for some rows; `source` is the rows' part of the output's gradient, by TOGETHER channels. */
static void differentiate_mixed(const Pass *p, const Sides *s, const float *cell, index_t rows, const float *source,
                                const Backward *m) {
    for (index_t line = 0; line < p->depths; line += TOGETHER)
        for (index_t c = 0; c < p->lanes; c += LANES) {
            index_t lines = smaller(TOGETHER, p->depths - line), lanes = smaller(LANES, p->lanes - c);
            take_lines(cell + line * p->depth_step + c, p->depth_step, lines, lanes, m->lines);
            product_fetching(rows, 2, lines, source + line * rows_at_once(p, s), TOGETHER, 1, m->lines, LANES,
                             m->mixed + c / LANES * panel_step(p, s), LANES, line > 0,
                             come_next(cell, p->depth_step, line, TOGETHER, c, LANES, p->lanes));
        }
}

/* Write the gradient of one cell, or add to it; `turned` is the rows' part of the output's gradient, transposed. */
static void differentiate_cell(const Pass *p, const Sides *s, float *cell, index_t rows, const float *turned,
                               const Backward *m, int add) {
    index_t step = rows_at_once(p, s);
    for (index_t line = 0; line < p->depths; line += TOGETHER)
        for (index_t c = 0; c < p->lanes; c += LANES) {
            index_t lines = smaller(TOGETHER, p->depths - line), lanes = smaller(LANES, p->lanes - c);
            const float *from = turned + line * step, *mixed = m->mixed + c / LANES * panel_step(p, s);
            float *to = cell + line * p->depth_step + c;
            if (lanes == LANES) {
                product_fetching(lines, 2, rows, from, step, 1, mixed, LANES, to, p->depth_step, add,
                                 come_next(cell, p->depth_step, line, TOGETHER, c, LANES, p->lanes));
                continue;
            }
            product(lines, 2, rows, from, step, 1, mixed, LANES, m->lines, LANES, 0);
            for (index_t i = 0; i < lines; i++, to += p->depth_step)
                for (index_t l = 0; l < lanes; l++) to[l] = m->lines[i * LANES + l] + (add ? to[l] : 0);
        }
}

/* All gradients for one cell and samples whose mixed inputs fit the cache together. `source` and `turned` are their
   output's gradient, by TOGETHER channels and transposed; `maps` are their inputs, `in` the gradient of these. */
static void differentiate(const Pass *p, const Sides *s, index_t cell, index_t first, index_t samples,
                          const float *source, const float *turned, const float *maps, float *in, const Backward *m,
                          float *alpha_gradient, int add) {
    index_t rows = rows_of(s, samples), place = cell * p->cell_step;
    if (p->out.data || alpha_gradient) {
        differentiate_mixed(p, s, p->cell + place, rows, source, m);
        differentiate_inputs(p, s, cell, first, samples, maps, m->mixed, in, alpha_gradient);
    }
    if (!p->cell_gradient) return;
    mix_inputs(p, s, cell, first, samples, maps, m->mixed, LANES, panel_step(p, s));
    differentiate_cell(p, s, p->cell_gradient + place, rows, turned, m, add);
}

/* Lay out the output's gradient, which is [rows, channels], as the products take it. */
static void lay_out_source(const Pass *p, const Sides *s, index_t samples, const float *source, float *by_lines,
                           float *turned) {
    index_t width = padded(p->depths), step = rows_at_once(p, s);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t chunk = 0; chunk < pieces(samples, p->mixed_samples); chunk++) {
        index_t b = chunk * p->mixed_samples, rows = rows_of(s, smaller(p->mixed_samples, samples - b));
        const float *from = source + b * s->out.size;
        float *to = by_lines + chunk * chunk_size(p, s);
        arrange(from, 1, width, turned + chunk * chunk_size(p, s), step, p->depths, rows);
        for (index_t line = 0; line < p->depths; line += TOGETHER)
            arrange(from + line, width, 1, to + line * step, TOGETHER, rows, smaller(TOGETHER, p->depths - line));
    }
}

/* Write the gradient of some input channels of one sample, added up over the threads. */
static void write_gradient(const Pass *p, const Sides *s, index_t first, index_t b, index_t group, index_t lane,
                           float *own, index_t memory, float *written) {
    index_t lanes = smaller(LANES, p->lanes - lane), width = padded(p->lanes);
    memset(written, 0, p->out_positions * LANES * sizeof(float));
    for (index_t thread = 0; thread < p->threads; thread++) {
        Backward m;
        lay_out_backward(p, s, own + thread * memory, &m);
        const float *from = m.in + b * s->in.size + group * p->out_positions * width + lane;
        for (index_t i = 0; i < p->out_positions; i++)
            for (index_t l = 0; l < lanes; l++) written[i * LANES + l] += from[i * width + l];
    }
    write_map(p, first + b, group * p->lanes + lane, lanes, NULL, written);
}

void kw_mix_inputs_backward(const Pass *p) {
    Sides s = backward_sides(p);
    index_t memory = lay_out_backward(p, &s, NULL, &(Backward){0}), blocks = pieces(p->lanes, LANES);
    index_t each = chunk_size(p, &s), gradients = p->batch * p->rows * padded(p->cells);
    float *maps = p->memory, *source = maps + p->read_samples * s.in.size;
    float *by_lines = source + p->read_samples * s.out.size, *turned = by_lines + chunks(p) * each;
    float *own = p->memory + shared(p, &s);
    for (index_t first = 0; first < p->batch; first += p->read_samples) {
        index_t samples = smaller(p->read_samples, p->batch - first), items = samples * p->lane_groups * blocks;
        read_maps(p, &p->other, &s.in, first, samples, maps);
        read_maps(p, &p->source, &s.out, first, samples, source);
        lay_out_source(p, &s, samples, source, by_lines, turned);
#pragma omp parallel num_threads(p->threads)
        {
#pragma omp for schedule(static)
            for (index_t thread = 0; thread < p->threads; thread++) {
                Backward m;
                lay_out_backward(p, &s, own + thread * memory, &m);
                memset(m.in, 0, p->read_samples * s.in.size * sizeof(float));
                float *of_alpha = p->alpha_gradient ? p->alpha_gradient + thread * gradients : NULL;
                for (index_t j = p->cells * thread / p->threads; j < p->cells * (thread + 1) / p->threads; j++)
                    for (index_t b = 0; b < samples; b += p->mixed_samples)
                        differentiate(p, &s, j, first + b, smaller(p->mixed_samples, samples - b),
                                      by_lines + b / p->mixed_samples * each, turned + b / p->mixed_samples * each,
                                      maps + b * s.in.size, m.in + b * s.in.size, &m, of_alpha,
                                      p->adds || first + b > 0);
            }
#pragma omp for schedule(static)
            for (index_t thread = 0; thread < p->threads; thread++) {
                Backward m;
                lay_out_backward(p, &s, own + thread * memory, &m);
                for (index_t i = items * thread / p->threads; p->out.data && i < items * (thread + 1) / p->threads; i++)
                    write_gradient(p, &s, first, i / blocks / p->lane_groups, i / blocks % p->lane_groups,
                                   i % blocks * LANES, own, memory, m.written);
            }
        }
    }
}
