/* Kernels of one position, mixed and used as their cells lie: nothing is transposed.

   For every sample b and output channel (g, l), lane l of lane group g,

       out[b, g, l, p] = sum over groups h of depths and depths d of W[b, (g, h)][l, d] * source[b, h, d, p].

   Positions p lie along the vectors, as in maps whose channels come first. The kernel's numbers are scalars, which may
   lie in any order, so a line of a cell, [depths], is mixed as it is in memory. Some lines of the kernels of
   `mixed_samples` exist at once, with all depths: every output is written once.

   The source is laid out in panels of LANES positions: for all threads, `read_samples` at a time, or, where few blocks
   of lines use it, some panels at a time by each thread (`read_samples` is 0). */

#include "pass.h"

/* Depths that a tile takes at a time: its panel stays in the first-level cache from tile to tile. */
#define TILE_DEPTHS 256
/* Panels of so many depths that the second-level cache holds beside the lines. */
#define TILE_PANELS 4

/* The memory of one thread. */
typedef struct {
    float *block, *kernels, *out, *tail, *panels;
} Memory;

/* Numbers from cell to cell of a packed block, from line to line, and from mixture to mixture: whole vectors, padded so
   that neighbours do not share a set of the cache. */
static index_t block_step(const Pass *p) { return padded(p->block_depths) + LANES; }
static index_t line_step(const Pass *p) { return padded(p->depths); }
static index_t kernel_step(const Pass *p) { return p->lines * line_step(p) + LANES; }

/* Whether tiles of lines are written straight into the map. */
static int straight(const Pass *p) { return p->out.position == 1; }

/* Numbers of a line of out in a thread's memory. */
static index_t out_step(const Pass *p) { return padded(p->out_positions); }

static index_t channels(const Pass *p) { return p->depths * p->depth_groups; }
static index_t source_size(const Pass *p) { return channels(p) * padded(p->out_positions); }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    m->block = at, at += p->cells * block_step(p);
    m->kernels = at, at += p->mixed_samples * p->rows * kernel_step(p);
    m->out = at, at += straight(p) ? 0 : p->lane_groups * p->lines * out_step(p);
    m->tail = at, at += p->lane_groups * p->lines * LANES;
    m->panels = at, at += p->read_samples ? 0 : TILE_PANELS * TILE_DEPTHS * LANES;
    return padded(at - start);
}

index_t kw_mix_lines_memory(const Pass *p) {
    return p->read_samples * source_size(p) + p->threads * lay_out(p, NULL, &(Memory){0});
}

/* Some channels of one sample as panels, [panel][channel][position]: what each position reads, zero for none. */
static void read_panels(const Pass *p, index_t sample, index_t channel, index_t channels, index_t from, index_t to,
                        float *panel) {
    const Map *map = &p->source;
    const float *data = map->data + sample * map->batch + channel * map->channel;
    const float *end = data + (channels - 1) * map->channel + map->positions;
    for (index_t first = from; first < to; first += LANES, panel += channels * LANES) {
        const int32_t *reads = p->reads + first;
        index_t count = smaller(LANES, to - first), following = 1;
        for (index_t i = 0; i < count; i++) following = following && reads[0] >= 0 && reads[i] == reads[0] + i;
        if (count < LANES) memset(panel, 0, channels * LANES * sizeof(float));
        if (following && map->position == 1) {
            const float *line = data + reads[0], *last = end - LANES;
            float *at = panel;
            for (index_t c = 0; c < channels; c++, line += map->channel, at += LANES) {
                if (line > last) { /* less than a panel before the map's end */
                    memcpy(at, line, count * sizeof(float));
                    continue;
                }
                STORE(at, LOAD(line));
                STORE(at + WIDTH, LOAD(line + WIDTH));
            }
        } else if (following) {
            arrange(data + reads[0] * map->position, map->channel, map->position, panel, LANES, channels, count);
        } else {
            for (index_t c = 0; c < channels; c++)
                for (index_t i = 0; i < count; i++)
                    panel[c * LANES + i] = reads[i] < 0 ? 0 : data[c * map->channel + reads[i] * map->position];
        }
    }
}

/* The panels of some samples, for all threads. */
static void read_source_panels(const Pass *p, index_t first, index_t samples, float *to) {
    index_t panels = pieces(p->out_positions, LANES), count = samples * panels;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t i = 0; i < count; i++) {
        index_t from = i % panels * LANES;
        read_panels(p, first + i / panels, 0, channels(p), from, smaller(from + LANES, p->out_positions),
                    to + i * channels(p) * LANES);
    }
}

/* Mix some lines of the kernels of samples. */
static void mix(const Pass *p, index_t line, index_t lines, index_t first, index_t samples, const Memory *m) {
    index_t rows = samples * p->rows, step = block_step(p);
    const float *alpha = p->alpha + first * p->rows * p->cells;
    for (index_t l = 0; l < lines; l++)
        for (index_t depth = 0; depth < p->depths; depth += p->block_depths) {
            index_t depths = smaller(p->block_depths, p->depths - depth);
            const float *cell = p->cell + (line + l) * p->lane_step + depth;
            for (index_t j = 0; j < p->cells; j++, cell += p->cell_step) {
                float *to = m->block + j * step;
                memcpy(to, cell, depths * sizeof(float));
                if (depths < padded(depths)) memset(to + depths, 0, (padded(depths) - depths) * sizeof(float));
            }
            for (index_t d = 0; d < depths; d += LANES)
                product(rows, depths - d > WIDTH ? 2 : 1, p->cells, alpha, p->cells, 1, m->block + d, step,
                        m->kernels + l * line_step(p) + depth + d, kernel_step(p), 0);
        }
}

/* What a tile of lines sums over: some depths of some groups, of kernels and of a panel. */
typedef struct {
    index_t groups, depths; /* how many of each; then the steps from group to group */
    index_t kernel_group, source_group;
    int add;
} Visit;

INLINE void tile_rows(const int rows, const int vectors, const Visit *v, const float *kernel, index_t line,
                      const float *source, float *out, index_t out_row) {
    vector sum[NARROW_ROWS][2];
    EACH_ROW(rows) {
        sum[r][0] = v->add ? LOAD(out + r * out_row) : (vector){0};
        sum[r][1] = v->add && vectors > 1 ? LOAD(out + r * out_row + WIDTH) : (vector){0};
    }
    for (index_t h = 0; h < v->groups; h++) {
        const float *a = kernel + h * v->kernel_group, *b = source + h * v->source_group;
        for (index_t d = 0; d < v->depths; d++, a++, b += LANES) {
            vector b0 = LOAD(b), b1 = vectors > 1 ? LOAD(b + WIDTH) : b0;
            EACH_ROW(rows) {
                sum[r][0] += a[r * line] * b0;
                if (vectors > 1) sum[r][1] += a[r * line] * b1;
            }
        }
    }
    EACH_ROW(rows) {
        STORE(out + r * out_row, sum[r][0]);
        if (vectors > 1) STORE(out + r * out_row + WIDTH, sum[r][1]);
    }
}

/* Some lines on one panel, cut evenly into tiles. */
static void tile_lines(int vectors, index_t lines, const Visit *v, const float *kernel, index_t line,
                       const float *source, float *out, index_t out_row) {
    for (index_t tiles = pieces(lines, MOST_ROWS(vectors)), first = 0; tiles > 0; tiles--) {
        index_t count = (lines - first) / tiles;
        const float *from = kernel + first * line;
        float *to = out + first * out_row;
        first += count;
        switch (2 * count + (vectors > 1)) {
#define CASE(N)                                              \
    case 2 * N:                                              \
        tile_rows(N, 1, v, from, line, source, to, out_row); \
        break;
            EACH_NARROW_COUNT(CASE)
#undef CASE
#define CASE(N)                                              \
    case 2 * N + 1:                                          \
        tile_rows(N, 2, v, from, line, source, to, out_row); \
        break;
            EACH_COUNT(CASE)
#undef CASE
        }
    }
}

/* Apply the kernels of some lines of all groups to one sample, some depths and panels at a time. The last panel, if it
   is not whole, is written to `tail`. */
static void apply(const Pass *p, index_t lines, index_t sample, const float *source, const float *kernels, float *out,
                  index_t out_group, index_t out_row, float *tail, const Memory *m) {
    index_t groups = larger(TILE_DEPTHS / p->depths, 1), most = TILE_PANELS * LANES;
    for (index_t from = 0; from < p->out_positions; from += most)
        for (index_t h = 0; h < p->depth_groups; h += groups)
            for (index_t d = 0; d < p->depths; d += TILE_DEPTHS) {
                index_t to = smaller(from + most, p->out_positions), channel = h * p->depths + d, size = channels(p);
                Visit v = {smaller(groups, p->depth_groups - h), smaller(TILE_DEPTHS, p->depths - d),
                           p->row_depth * kernel_step(p), p->depths * LANES, h > 0 || d > 0};
                const float *panel = m->panels;
                if (source) {
                    panel = source + from * size + channel * LANES;
                } else {
                    size = v.groups > 1 ? v.groups * p->depths : v.depths;
                    read_panels(p, sample, channel, size, from, to, m->panels);
                }
                for (index_t first = from; first < to; first += LANES, panel += size * LANES)
                    for (index_t g = 0; g < p->lane_groups; g++) {
                        index_t count = to - first;
                        int cut = tail && count < LANES;
                        tile_lines(count > WIDTH ? 2 : 1, lines, &v,
                                   kernels + (g * p->row_lane + h * p->row_depth) * kernel_step(p) + d, line_step(p),
                                   panel, cut ? tail + g * lines * LANES : out + g * out_group + first,
                                   cut ? LANES : out_row);
                    }
            }
}

/* Write some lines of one sample's map, through the epilogue if there is one. */
static void write_lines(const Pass *p, index_t sample, index_t channel, index_t lines, float *out, index_t out_row,
                        const float *tail) {
    const Map *map = &p->out;
    index_t cut = p->out_positions / LANES * LANES;
    for (index_t l = 0; tail && cut < p->out_positions && l < lines; l++)
        memcpy(out + l * out_row + cut, tail + l * LANES, (p->out_positions - cut) * sizeof(float));
    if (p->epilogue.present) finish_lines(&p->epilogue, sample, channel, lines, 0, p->out_positions, out, out_row);
    if (!straight(p))
        arrange(out, 1, out_row, map->data + sample * map->batch + channel * map->channel, map->position,
                p->out_positions, lines);
}

/* Some lines of a cell, for samples `first` to `last` of the batch; their panels are in `source` if they are shared. */
static void run_lines(const Pass *p, index_t line, index_t lines, index_t first, index_t last, const float *source,
                      const Memory *m) {
    const Map *map = &p->out;
    int direct = straight(p);
    index_t out_row = direct ? map->channel : out_step(p), out_group = direct ? p->lanes * out_row : lines * out_row;
    for (index_t b = first; b < last; b += p->mixed_samples) {
        index_t samples = smaller(p->mixed_samples, last - b);
        mix(p, line, lines, b, samples, m);
        for (index_t s = 0; s < samples; s++) {
            float *out = direct ? map->data + (b + s) * map->batch + line * map->channel : m->out;
            apply(p, lines, b + s, source ? source + (b - first + s) * source_size(p) : NULL,
                  m->kernels + s * p->rows * kernel_step(p), out, out_group, out_row, direct ? m->tail : NULL, m);
            for (index_t g = 0; g < p->lane_groups; g++)
                write_lines(p, b + s, g * p->lanes + line, lines, out + g * out_group, out_row,
                            direct ? m->tail + g * lines * LANES : NULL);
        }
    }
}

/* Do the work for all lines and samples: a thread takes neighbouring blocks of lines, or parts of their samples. */
void kw_mix_lines(const Pass *p) {
    index_t memory = lay_out(p, NULL, &(Memory){0}), blocks = pieces(p->lanes, p->lines), items = blocks * p->parts;
    index_t together = p->read_samples ? p->read_samples : p->batch;
    float *source = p->read_samples ? p->memory : NULL, *own = p->memory + p->read_samples * source_size(p);
    for (index_t first = 0; first < p->batch; first += together) {
        index_t samples = smaller(together, p->batch - first);
        if (source) read_source_panels(p, first, samples, source);
#pragma omp parallel for schedule(static) num_threads(p->threads)
        for (index_t thread = 0; thread < p->threads; thread++) {
            Memory m;
            lay_out(p, own + thread * memory, &m);
            for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
                index_t block = i / p->parts, line = p->lanes * block / blocks, end = p->lanes * (block + 1) / blocks;
                index_t part = i % p->parts, from = samples * part / p->parts, to = samples * (part + 1) / p->parts;
                if (from < to)
                    run_lines(p, line, end - line, first + from, first + to,
                              source ? source + from * source_size(p) : NULL, &m);
            }
        }
    }
}
