/* The gradients of mix_rows.c: lanes are its columns, input channels, and depths its lines, output channels.

   All threads work on the same `lines` lines at a time. First the gradient of their kernels is made from panels of both
   maps. Then, one run of all cells after the other, the kernels are mixed, and their gradient is folded into those of
   alpha and E, as these lie. Last the kernels add to the input's gradient. Maps whose channels come first are
   transposed as they are read; the gradient of such an input is summed up with channels last, and transposed at the
   end. */

#include "folds.h"

/* Positions of the input's gradient that are added to at a time, and lines, of several groups, that are summed in
   registers before that. */
#define POSITIONS 96
#define TERMS 64
/* About how many positions the kernels' gradient is summed over at a time. */
#define SPAN 192
/* Columns that are transposed together. */
#define TURNED 64
/* The memory that all threads share, and, from `folds` on, that of each. `out` is the input's gradient with channels
   last, if its map has them first. */
typedef struct {
    float *kernels, *gradient, *source, *other, *out, *folds;
} Shared;

/* Numbers from mixture to mixture of a part, and from position to position of its lines. */
static index_t part_step(const Pass *p) { return p->lines * p->lanes + LANES; }
static index_t source_step(const Pass *p) { return (pieces(p->lines, 16) | 1) * 16; }

static index_t source_size(const Pass *p) { return p->depth_groups * p->source_positions * source_step(p); }
static index_t columns(const Pass *p) { return p->lane_groups * p->lanes; }
static index_t other_size(const Pass *p) { return columns(p) * p->source_positions; }
static int turns_out(const Pass *p) { return p->out.data && p->out.channel != 1; }

static index_t lay_out_shared(const Pass *p, float *at, Shared *m) {
    float *start = at;
    index_t kernels = p->mixed_samples * p->rows * part_step(p);
    m->kernels = at, at += p->out.data ? kernels : 0;
    m->gradient = at, at += p->other.data ? kernels : 0;
    m->source = at, at += p->mixed_samples * source_size(p);
    m->other = at, at += p->other.data ? p->mixed_samples * other_size(p) : 0;
    m->out = at, at += turns_out(p) ? p->mixed_samples * other_size(p) : 0;
    m->folds = at, at += p->threads * folds_size(p);
    return padded(at - start);
}

index_t kw_mix_rows_backward_memory(const Pass *p) { return lay_out_shared(p, NULL, &(Shared){0}); }

/* The columns of samples in panels, [sample, group][LANES columns][position][column]. */
static void read_columns(const Pass *p, const Part *k, const Shared *m) {
    const Map *map = &p->other;
    index_t blocks = pieces(p->source_positions, SPAN), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t item = 0; item < items; item++) {
        index_t s = item / blocks, from = item % blocks * SPAN, to = smaller(from + SPAN, p->source_positions);
        const float *at = map->data + (k->first + s) * map->batch + from * map->position;
        float *panel = m->other + s * other_size(p) + from * LANES;
        if (map->channel != 1) {
            for (index_t d = 0; d < columns(p); d += LANES)
                arrange(at + d * map->channel, map->position, map->channel, panel + d * p->source_positions, LANES,
                        to - from, LANES);
            continue;
        }
        for (index_t i = from; i < to; i++, at += map->position, panel += LANES)
            for (index_t d = 0; d < columns(p); d += LANES) {
                STORE(panel + d * p->source_positions, LOAD(at + d));
                STORE(panel + d * p->source_positions + WIDTH, LOAD(at + d + WIDTH));
            }
    }
}

/* The lines of samples, [sample, group][position][line]. */
static void read_lines(const Pass *p, const Part *k, const Shared *m) {
    const Map *map = &p->source;
    index_t maps = k->samples * p->depth_groups;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < maps; i++) {
        index_t sample = k->first + i / p->depth_groups, channel = i % p->depth_groups * p->depths + k->line;
        arrange(map->data + sample * map->batch + channel * map->channel, map->position, map->channel,
                m->source + i * p->source_positions * source_step(p), source_step(p), p->source_positions, k->lines);
    }
}

/* What the lines of one sample add to the gradient of the input at some positions. */
static void add_to_input(const Pass *p, const Part *k, index_t s, index_t from, index_t count, const Shared *m) {
    index_t step = turns_out(p) ? columns(p) : p->out.position;
    float *out = turns_out(p) ? m->out + s * other_size(p) : p->out.data + (k->first + s) * p->out.batch;
    const float *kernels = m->kernels + s * p->rows * part_step(p);
    const float *source = m->source + s * source_size(p) + from * source_step(p);
    index_t source_group = p->source_positions * source_step(p), kernel_group = p->row_depth * part_step(p);
    index_t together = larger(TERMS / k->lines, 1);
    for (index_t h = 0; h < p->lane_groups; h++)
        for (index_t d = 0; d < p->lanes; d += LANES)
            for (index_t g = 0; g < p->depth_groups; g += together)
                product_of_groups(count, 2, smaller(together, p->depth_groups - g), k->lines, source + g * source_group,
                                  source_step(p), 1, source_group,
                                  kernels + h * p->row_lane * part_step(p) + d * k->lines + g * kernel_group,
                                  kernel_group, out + from * step + h * p->lanes + d, step, k->line > 0 || g > 0);
}

/* The gradient of one sample's kernels at some panels of columns, summed over SPAN positions at a time, which stay
   near. */
static void differentiate(const Pass *p, const Part *k, index_t s, index_t panel, index_t end, const Shared *m) {
    const float *source = m->source + s * source_size(p), *other = m->other + s * other_size(p);
    float *gradient = m->gradient + s * p->rows * part_step(p);
    index_t spans = larger((p->source_positions + SPAN / 2) / SPAN, 1);
    for (index_t span = 0; span < spans; span++) {
        index_t from = p->source_positions * span / spans, to = p->source_positions * (span + 1) / spans;
        for (index_t column = panel * LANES; column < end * LANES; column += LANES)
            for (index_t g = 0; g < p->depth_groups; g++)
                product(
                    k->lines, 2, to - from, source + (g * p->source_positions + from) * source_step(p), 1,
                    source_step(p), other + column * p->source_positions + from * LANES, LANES,
                    gradient + (g * p->row_depth + column / p->lanes * p->row_lane) * part_step(p) + column % p->lanes,
                    p->lanes, span > 0);
    }
}

static void add_all_to_input(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(p->source_positions, POSITIONS), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < items; i++) {
        index_t from = p->source_positions * (i % blocks) / blocks;
        add_to_input(p, k, i / blocks, from, p->source_positions * (i % blocks + 1) / blocks - from, m);
    }
}

/* Transpose the input's gradient, [sample][position][column], into a map whose channels come first. */
static void write_columns(const Pass *p, const Part *k, const Shared *m) {
    index_t blocks = pieces(columns(p), TURNED), items = k->samples * blocks;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < items; i++) {
        index_t first = i % blocks * TURNED;
        arrange(m->out + i / blocks * other_size(p) + first, 1, columns(p),
                p->out.data + (k->first + i / blocks) * p->out.batch + first * p->out.channel, p->out.channel,
                smaller(TURNED, columns(p) - first), p->source_positions);
    }
}

static void differentiate_all(const Pass *p, const Part *k, const Shared *m) {
    index_t panels = columns(p) / LANES, items = k->samples * panels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++) {
        index_t first = items * thread / p->threads, last = items * (thread + 1) / p->threads;
        for (index_t s = first / panels; s * panels < last; s++)
            differentiate(p, k, s, larger(first - s * panels, 0), smaller(last - s * panels, panels), m);
    }
}

void kw_mix_rows_backward(const Pass *p) {
    Shared m;
    lay_out_shared(p, p->memory, &m);
    for (index_t b = 0; b < p->batch; b += p->mixed_samples) {
        Part k = {.first = b,
                  .samples = smaller(p->mixed_samples, p->batch - b),
                  .columns = p->lanes,
                  .step = part_step(p),
                  .line_step = LANES,
                  .kernels = m.kernels,
                  .gradient = m.gradient};
        if (p->other.data) read_columns(p, &k, &m);
        clear_sums(p, m.folds);
        for (; k.line < p->depths; k.line += k.lines) {
            k.lines = smaller(p->lines, p->depths - k.line), k.panel_step = LANES * k.lines;
            read_lines(p, &k, &m);
            if (p->other.data) differentiate_all(p, &k, &m);
            each_run(p, &k, m.folds, p->out.data != NULL, p->other.data != NULL, p->adds || b > 0);
            if (p->out.data) add_all_to_input(p, &k, &m);
        }
        if (turns_out(p)) write_columns(p, &k, &m);
        add_up_sums(p, &k, m.folds);
    }
}
