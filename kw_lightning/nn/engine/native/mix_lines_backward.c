/* The gradients of mix_lines.c. Kernels exist whole, for `mixed_samples` at once; maps may have channels first or last.

   Kernels are mixed as cells lie, a cell being one line. Then both gradients are products, for `read_samples` at a
   time, whose maps stay in the cache. That of the kernels is a sum over positions: columns, the input's channels, are
   transposed to lie along the vectors, so few positions at a time that these stay in the first-level cache. For that of
   the input, positions lie along the vectors, as in maps whose channels come first, and every number is written once.
   At last the kernels' gradient is folded into those of alpha and E. */

#include "folds.h"

/* About how many positions the kernels' gradient is summed over at a time. */
#define SPAN 192
/* Output channels whose panel of positions stays in the first-level cache. */
#define TILE_LINES 256

/* The memory that all threads share, and, from `own` and `folds` on, that of each. */
typedef struct {
    float *kernels, *gradient, *own, *folds;
} Shared;

static index_t columns(const Pass *p) { return p->lane_groups * p->lanes; }
static index_t lines(const Pass *p) { return p->depth_groups * p->depths; }
static index_t part_step(const Pass *p) { return p->depths * p->lanes + LANES; }

/* A panel of positions with the sums of all lines, or a panel of lines with the sums of all columns. */
static index_t own_size(const Pass *p) { return LANES * (lines(p) + larger(2 * SPAN, padded(columns(p)))); }

static index_t lay_out_shared(const Pass *p, float *at, Shared *m) {
    float *start = at;
    index_t kernels = p->mixed_samples * p->rows * part_step(p);
    m->kernels = at, at += p->out.data ? kernels : 0;
    m->gradient = at, at += p->other.data ? kernels : 0;
    m->own = at, at += p->threads * own_size(p);
    m->folds = at, at += p->threads * folds_size(p);
    return padded(at - start);
}

index_t kw_mix_lines_backward_memory(const Pass *p) { return lay_out_shared(p, NULL, &(Shared){0}); }

/* Copy a panel of columns of the gradient of a sample's kernels, [line][column], to where cells have them. */
static void spread(const Pass *p, index_t column, const float *sums, float *gradient) {
    index_t end = smaller(column + LANES, columns(p));
    for (index_t c = column, next; c < end; c = next) {
        index_t group = c / p->lanes;
        next = smaller((group + 1) * p->lanes, end);
        for (index_t g = 0; g < p->depth_groups; g++)
            arrange(sums + g * p->depths * LANES + c - column, LANES, 1,
                    gradient + (g * p->row_depth + group * p->row_lane) * part_step(p) + c % p->lanes, p->lanes,
                    p->depths, next - c);
    }
}

/* The gradient of one sample's kernels at a panel of columns, summed over some positions at a time. */
static void differentiate(const Pass *p, index_t sample, index_t column, float *own, float *gradient) {
    const float *source = p->source.data + sample * p->source.batch;
    const float *other = p->other.data + sample * p->other.batch + column * p->other.channel;
    index_t count = smaller(LANES, columns(p) - column);
    index_t spans = larger((p->source_positions + SPAN / 2) / SPAN, 1);
    float *panel = own, *sums = own + LANES * 2 * SPAN;
    if (count < LANES) memset(panel, 0, 2 * SPAN * LANES * sizeof(float));
    for (index_t span = 0; span < spans; span++) {
        index_t from = p->source_positions * span / spans, to = p->source_positions * (span + 1) / spans;
        arrange(other + from * p->other.position, p->other.position, p->other.channel, panel, LANES, to - from, count);
        product(lines(p), count > WIDTH ? 2 : 1, to - from, source + from * p->source.position, p->source.channel,
                p->source.position, panel, LANES, sums, LANES, span > 0);
    }
    spread(p, column, sums, gradient);
}

/* The same for all columns of some samples, from number s of the part on. */
static void differentiate_all(const Pass *p, const Part *k, index_t s, index_t samples, const Shared *m) {
    index_t panels = pieces(columns(p), LANES), items = samples * panels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++)
            differentiate(p, k->first + s + i / panels, i % panels * LANES, m->own + thread * own_size(p),
                          k->gradient + (s + i / panels) * p->rows * k->step);
}

/* The gradient of one sample's input at LANES positions or fewer, some lines at a time. It is written in place, or, if
   positions are fewer or channels come last, by way of `sums`. */
static void write_input(const Pass *p, const Part *k, index_t sample, index_t from, float *own, const float *kernels) {
    const Map *map = &p->out, *source = &p->source;
    index_t count = smaller(LANES, p->out_positions - from), groups = larger(TILE_LINES / p->depths, 1);
    float *out = map->data + sample * map->batch + from * map->position, *panel = own, *sums = own + LANES * lines(p);
    int straight = count == LANES && map->position == 1;
    float *to = straight ? out : sums;
    index_t row = straight ? map->channel : LANES;
    if (count < LANES) memset(panel, 0, lines(p) * LANES * sizeof(float));
    arrange(source->data + sample * source->batch + from * source->position, source->channel, source->position, panel,
            LANES, lines(p), count);
    for (index_t g = 0; g < p->depth_groups; g += groups)
        for (index_t l = 0; l < p->depths; l += TILE_LINES)
            for (index_t h = 0; h < p->lane_groups; h++)
                product_of_groups(p->lanes, count > WIDTH ? 2 : 1, smaller(groups, p->depth_groups - g),
                                  smaller(TILE_LINES, p->depths - l),
                                  kernels + (g * p->row_depth + h * p->row_lane) * k->step + l * p->lanes, 1, p->lanes,
                                  p->row_depth * k->step, panel + (g * p->depths + l) * LANES, p->depths * LANES,
                                  to + h * p->lanes * row, row, g > 0 || l > 0);
    if (straight) return;
    if (map->position == 1)
        arrange(sums, LANES, 1, out, map->channel, columns(p), count);
    else
        arrange(sums, 1, LANES, out, map->position, count, columns(p));
}

static void write_all_input(const Pass *p, const Part *k, index_t s, index_t samples, const Shared *m) {
    index_t panels = pieces(p->out_positions, LANES), items = samples * panels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++)
            write_input(p, k, k->first + s + i / panels, i % panels * LANES, m->own + thread * own_size(p),
                        k->kernels + (s + i / panels) * p->rows * k->step);
}

void kw_mix_lines_backward(const Pass *p) {
    Shared m;
    lay_out_shared(p, p->memory, &m);
    for (index_t b = 0; b < p->batch; b += p->mixed_samples) {
        Part k = {.first = b,
                  .samples = smaller(p->mixed_samples, p->batch - b),
                  .lines = 1,
                  .columns = p->depths * p->lanes,
                  .step = part_step(p),
                  .panel_step = LANES,
                  .kernels = m.kernels,
                  .gradient = m.gradient};
        clear_sums(p, m.folds);
        if (p->out.data) each_run(p, &k, m.folds, 1, 0, 0);
        for (index_t s = 0; s < k.samples; s += p->read_samples) {
            index_t samples = smaller(p->read_samples, k.samples - s);
            if (p->other.data) differentiate_all(p, &k, s, samples, &m);
            if (p->out.data) write_all_input(p, &k, s, samples, &m);
        }
        if (p->other.data) each_run(p, &k, m.folds, 0, 1, p->adds || b > 0);
        add_up_sums(p, &k, m.folds);
    }
}
