/* Mix kernels of a depthwise convolution, in which every channel is convolved by itself.

   As mix_kernels.c, but lanes are the one channel axis of a cell: maps are read LANES channels at a time, and positions
   are multiplied lane by lane. A cell has one kernel position, so W[b, (t, g)][l] = sum over j of alpha[b, t, g, j] *
   E[j][l] is a single product for all samples, taps t and groups g of lanes. The kernels of `lines` lanes exist at
   once; a mixture's are side by side in a row.

   A sample is computed strip by strip, all its lanes in turn, so that memory is read and written in order. A strip is
   some lines. Those that it reads are copied into the near caches with zeros around, so that a tile of a line's
   positions goes through the kernel's taps without looking up or testing what a position reads. Maps whose channels
   come last could be read in place, but this takes 1.2 to 2 times as long, since their positions are far apart. Where
   channels come first and lines are long enough, one channel is taken at a time: planes.h. */

#include "planes.h"

/* Blocks of lanes that are read together where channels come last: long runs of memory are read faster. */
#define BUNDLE 8

/* The memory of one thread. */
typedef struct {
    float *block, *turned, *gradient, *kernels, *source, *other, *factor, *out;
    int32_t *place; /* where lines are stored; by planes only */
} Memory;

/* Numbers from row to row of kernels: an odd number of blocks, so that one's taps do not share a set of the cache. */
static index_t row_step(const Pass *p) { return (p->lines / LANES | 1) * LANES; }

/* Blocks that are read together at most. */
static index_t bundle(const Pass *p) { return smaller(BUNDLE, p->lane_groups * p->lines / LANES); }

/* Numbers of the lines that a strip of a walk reads, zeros included, and of those that it writes. */
static index_t read_size(const Walk *w) { return w->held * w->room * LANES; }
static index_t strip_size(const Walk *w) { return w->strip * w->out * LANES; }

/* Which walks are by planes. */
static int out_by_planes(const Pass *p) { return by_planes(&p->walk, &p->source, &p->out); }
static int kernels_by_planes(const Pass *p) { return by_planes(&p->kernel_walk, &p->other, &p->source); }

static index_t lay_out(const Pass *p, float *at, Memory *m) {
    float *start = at;
    int out = p->out.data != NULL, kernels = p->other.data != NULL;
    Plane k = plane_of(&p->walk, &p->source), d = plane_of(&p->kernel_walk, &p->other);
    m->block = at, at += p->cells * p->lines;
    m->turned = at, at += kernels ? padded(p->cells) * p->lines : 0;
    m->gradient = at, at += kernels ? p->cells * p->lines : 0;
    m->kernels = at, at += p->mixed_samples * p->rows * row_step(p);
    m->source = at, at += !out ? 0 : out_by_planes(p) ? plane_size(&k) : bundle(p) * read_size(&p->walk);
    m->out = at, at += !out ? 0 : out_by_planes(p) ? k.most * k.out : strip_size(&p->walk);
    m->other = at, at += !kernels ? 0 : kernels_by_planes(p) ? plane_size(&d) : bundle(p) * read_size(&p->kernel_walk);
    m->factor = at, at += !kernels               ? 0
                          : kernels_by_planes(p) ? d.most * d.out
                                                 : bundle(p) * strip_size(&p->kernel_walk);
    m->place = (int32_t *)at;
    at += larger(out * k.most * (p->taps / p->walk.taps), kernels * d.most * (p->taps / p->kernel_walk.taps));
    return padded(at - start);
}

index_t kw_mix_depthwise_memory(const Pass *p) { return p->threads * lay_out(p, NULL, &(Memory){0}); }

/* What is computed at once: a strip of some channels of one sample. It is `lines` lines of out from `line` on, and they
   read `reads` lines of the source from `first_read` on. `kernels` are those of the first group; `tap` and `tap_line`
   are the steps to the next tap and to the next line of taps. */
typedef struct {
    index_t sample, channel, channels;
    index_t line, lines, first_read, reads;
    index_t block, blocks; /* its first block of lanes; how many a group has */
    float *kernels;
    index_t tap, tap_line;
    int add; /* whether a strip of the same maps came before */
} Part;

/* The kernels of a part's block. */
static float *kernels_of(const Pass *p, const Part *s, index_t block) {
    index_t group = (s->block + block) / s->blocks, l = (s->block + block) % s->blocks * LANES;
    return s->kernels + group * p->row_lane * row_step(p) + l;
}

/* Some lines of a part's channels in blocks of LANES, [block][line][room][lane], a block in `held` numbers. */
static void read_lines(const Map *map, index_t positions, index_t before, index_t room, const Part *s, index_t first,
                       index_t lines, index_t held, float *to) {
    index_t channels = s->channels, whole = channels / LANES * LANES;
    const float *from = map->data + s->sample * map->batch + s->channel * map->channel;
    from += first * positions * map->position;
    to += before * LANES;
    for (; lines > 0; lines--, from += positions * map->position, to += room * LANES) {
        float *rest = to + whole / LANES * held;
        if (whole < channels) {
            memset(rest, 0, positions * LANES * sizeof(float));
            arrange(from + whole * map->channel, map->position, map->channel, rest, LANES, positions, channels - whole);
        }
        if (map->channel == 1)
            for (index_t i = 0; i < positions; i++) {
                const float *a = from + i * map->position;
                float *c = to + i * LANES;
                for (index_t l = 0; l < whole; l += LANES, a += LANES, c += held) {
                    STORE(c, LOAD(a));
                    STORE(c + WIDTH, LOAD(a + WIDTH));
                }
            }
        else
            for (index_t l = 0; l < whole; l += LANES)
                arrange(from + l * map->channel, map->position, map->channel, to + l / LANES * held, LANES, positions,
                        LANES);
    }
}

/* Clear the zeros around all lines that a strip may read, of some blocks. */
static void clear_sides(const Walk *w, index_t blocks, float *to) {
    index_t after = w->room - w->before - w->source;
    for (index_t line = 0; line < blocks * w->held; line++, to += w->room * LANES) {
        memset(to, 0, w->before * LANES * sizeof(float));
        memset(to + (w->before + w->source) * LANES, 0, after * LANES * sizeof(float));
    }
}

/* One tile of a line's positions; a `read_step` of 1 or 2 is a constant to the compiler. */
INLINE void walk_rows(const int rows, const index_t read_step, const Pass *p, const Part *s, const Phase *f,
                      const int32_t *reads, const float *source, const float *kernels, float *out, index_t out_step,
                      index_t ahead) {
    const Walk *w = &p->walk;
    index_t kernel_lines = p->taps / w->taps;
    vector sum[LONG_ROWS][2];
    EACH_ROW(rows) sum[r][0] = sum[r][1] = (vector){0};
    EACH_ROW(rows) __builtin_prefetch(out + ahead + r * out_step, 1);
    for (index_t t = 0; t < kernel_lines; t++, reads += w->lines) {
        if (*reads < 0) continue;
        const float *a = source + (*reads - s->first_read) * w->room * LANES;
        const float *kernel = kernels + t * s->tap_line + f->tap * s->tap;
        for (index_t i = 0; i < f->taps; i++, a += f->tap_read * LANES, kernel += f->tap_step * s->tap) {
            vector k0 = LOAD(kernel), k1 = LOAD(kernel + WIDTH);
            EACH_ROW(rows) {
                sum[r][0] += LOAD(a + r * read_step * LANES) * k0;
                sum[r][1] += LOAD(a + r * read_step * LANES + WIDTH) * k1;
            }
        }
    }
    EACH_ROW(rows) {
        STORE(out + r * out_step, sum[r][0]);
        STORE(out + r * out_step + WIDTH, sum[r][1]);
    }
}

static void walk_tile(const Pass *p, const Part *s, const Phase *f, index_t rows, const int32_t *reads,
                      const float *source, const float *kernels, float *out, index_t out_step, index_t ahead) {
    switch (4 * rows + (f->read_step > 2 ? 0 : f->read_step)) {
#define CASE(N)                                                                            \
    case 4 * N:                                                                            \
        walk_rows(N, f->read_step, p, s, f, reads, source, kernels, out, out_step, ahead); \
        break;                                                                             \
    case 4 * N + 1:                                                                        \
        walk_rows(N, 1, p, s, f, reads, source, kernels, out, out_step, ahead);            \
        break;                                                                             \
    case 4 * N + 2:                                                                        \
        walk_rows(N, 2, p, s, f, reads, source, kernels, out, out_step, ahead);            \
        break;
        EACH_LONG_COUNT(CASE)
#undef CASE
    }
}

/* The lines of a strip, each cut evenly into tiles; `position` is the step from one position of out to the next. */
static void walk_strip(const Pass *p, const Part *s, const float *source, const float *kernels, float *out,
                       index_t position) {
    const Walk *w = &p->walk;
    for (index_t l = 0; l < s->lines; l++, out += w->out * position)
        for (const Phase *f = w->phase; f < w->phase + w->phases; f++)
            for (index_t tiles = pieces(f->positions, LONG_ROWS), i = 0, rows; tiles > 0; tiles--, i += rows) {
                rows = (f->positions - i) / tiles;
                walk_tile(p, s, f, rows, w->reads + s->line + l, source + (f->read + i * f->read_step) * LANES, kernels,
                          out + (f->first + i * f->step) * position, f->step * position, w->out * position);
            }
}

/* Compute and write a part of out. */
static void convolve(const Pass *p, const Part *s, const Memory *m) {
    const Map *map = &p->out;
    const Walk *w = &p->walk;
    index_t first = s->line * w->out;
    int direct = map->channel == 1 && !p->epilogue.present;
    float *to = map->data + s->sample * map->batch + s->channel * map->channel + first * map->position;
    read_lines(&p->source, w->source, w->before, w->room, s, s->first_read, s->reads, read_size(w), m->source);
    for (index_t l = 0; l < s->channels; l += LANES) {
        const float *source = m->source + l / LANES * read_size(w), *kernels = kernels_of(p, s, l / LANES);
        index_t lanes = smaller(LANES, s->channels - l);
        if (direct && lanes == LANES) {
            walk_strip(p, s, source, kernels, to + l, map->position);
            continue;
        }
        walk_strip(p, s, source, kernels, m->out, LANES);
        write_rows(map, &p->epilogue, s->sample, s->channel + l, lanes, LANES, first, s->lines * w->out, m->out);
    }
}

/* The gradient of neighbouring taps of one line of the kernel, summed over a strip; `turns` positions at a time have
   sums of their own. */
INLINE void inner_rows(const int rows, const int turns, const Walk *w, const Part *s, const int32_t *reads,
                       const float *factor, const float *other, float *c, index_t c_row, int add) {
    const Phase *f = w->phase;
    index_t tap = f->tap_read * LANES, step = f->read_step * LANES;
    vector sum[LONG_ROWS][2];
    EACH_ROW(rows * turns) {
        sum[r][0] = add && r < rows ? LOAD(c + r * c_row) : (vector){0};
        sum[r][1] = add && r < rows ? LOAD(c + r * c_row + WIDTH) : (vector){0};
    }
    for (index_t l = 0; l < s->lines; l++, factor += w->out * LANES) {
        if (reads[l] < 0) continue;
        const float *a = other + (reads[l] - s->first_read) * w->room * LANES, *b = factor;
        index_t x = w->out;
        for (; x >= turns; x -= turns)
            for (int u = 0; u < turns; u++, a += step, b += LANES) {
                vector b0 = LOAD(b), b1 = LOAD(b + WIDTH);
                EACH_ROW(rows) {
                    sum[u * rows + r][0] += LOAD(a + r * tap) * b0;
                    sum[u * rows + r][1] += LOAD(a + r * tap + WIDTH) * b1;
                }
            }
        for (; x > 0; x--, a += step, b += LANES) {
            vector b0 = LOAD(b), b1 = LOAD(b + WIDTH);
            EACH_ROW(rows) {
                sum[r][0] += LOAD(a + r * tap) * b0;
                sum[r][1] += LOAD(a + r * tap + WIDTH) * b1;
            }
        }
    }
    for (int u = 1; u < turns; u++) EACH_ROW(rows) {
            sum[r][0] += sum[u * rows + r][0];
            sum[r][1] += sum[u * rows + r][1];
        }
    EACH_ROW(rows) {
        STORE(c + r * c_row, sum[r][0]);
        STORE(c + r * c_row + WIDTH, sum[r][1]);
    }
}

/* Write, or add to, the gradient of a part's kernels, from the output's gradient there. */
static void differentiate(const Pass *p, const Part *s, const Memory *m) {
    const Walk *w = &p->kernel_walk;
    const Phase *f = w->phase;
    read_lines(&p->other, w->source, w->before, w->room, s, s->first_read, s->reads, read_size(w), m->other);
    read_lines(&p->source, w->out, 0, w->out, s, s->line, s->lines, strip_size(w), m->factor);
    for (index_t l = 0; l < s->channels; l += LANES)
        for (index_t t = 0; t < p->taps / w->taps; t++)
            for (index_t tiles = pieces(w->taps, LONG_ROWS), i = 0, rows; tiles > 0; tiles--, i += rows) {
                const int32_t *reads = w->reads + t * w->lines + s->line;
                const float *other = m->other + l / LANES * read_size(w) + (f->read + i * f->tap_read) * LANES;
                const float *factor = m->factor + l / LANES * strip_size(w);
                float *c = kernels_of(p, s, l / LANES) + t * s->tap_line + i * s->tap;
                rows = (w->taps - i) / tiles;
                switch (rows) {
#define CASE(N)                                                                                              \
    case N:                                                                                                  \
        inner_rows(N, LONG_ROWS / N > 4 ? 4 : LONG_ROWS / N, w, s, reads, factor, other, c, s->tap, s->add); \
        break;
                    EACH_LONG_COUNT(CASE)
#undef CASE
                }
            }
}

/* Compute and write a part of out, a channel at a time. */
static void convolve_planes(const Pass *p, const Part *s, const Memory *m) {
    const Walk *w = &p->walk;
    Plane k = plane_of(w, &p->source);
    place_lines(w, &k, p->taps / w->taps, s->line, s->lines, s->first_read, m->place);
    for (index_t l = 0, channel = s->channel; l < s->channels; l++, channel++) {
        const float *from = p->source.data + s->sample * p->source.batch + channel * p->source.channel;
        float *to = p->out.data + s->sample * p->out.batch + channel * p->out.channel + s->line * w->out;
        read_plane(w, &k, from + s->first_read * w->source, s->reads, m->source);
        convolve_plane(p, &k, m->place, s->lines, m->source, kernels_of(p, s, l / LANES) + l % LANES, s->tap,
                       s->tap_line, m->out, to);
        if (p->epilogue.present)
            finish_lines(&p->epilogue, s->sample, channel, 1, s->line * w->out, s->lines * w->out, to, 0);
    }
}

/* The gradient of the kernels of a part, a channel at a time. */
static void differentiate_planes(const Pass *p, const Part *s, const Memory *m) {
    const Walk *w = &p->kernel_walk;
    Plane k = plane_of(w, &p->other);
    index_t rest = s->channels % LANES;
    place_lines(w, &k, p->taps / w->taps, s->line, s->lines, s->first_read, m->place);
    for (index_t t = 0; !s->add && rest && t < p->taps; t++)
        memset(kernels_of(p, s, s->channels / LANES) + t * s->tap + rest, 0, (LANES - rest) * sizeof(float));
    for (index_t l = 0, channel = s->channel; l < s->channels; l++, channel++) {
        const float *from = p->other.data + s->sample * p->other.batch + channel * p->other.channel;
        const float *factor = p->source.data + s->sample * p->source.batch + channel * p->source.channel;
        read_plane(w, &k, from + s->first_read * w->source, s->reads, m->other);
        for (index_t i = 0; i < s->lines; i++)
            copy_line(factor + (s->line + i) * w->out, m->factor + i * k.out, w->out);
        differentiate_plane(p, &k, m->place, s->lines, m->other, m->factor, kernels_of(p, s, l / LANES) + l % LANES,
                            s->tap, s->tap_line, s->add);
    }
}

/* Find the strip at a part's line. By planes, `k`, as many of the next strips as fit are joined to it. */
static void find_strip(const Walk *w, const Plane *k, index_t to, Part *s) {
    const int32_t *range = w->range + s->line / w->strip * 2;
    index_t end = range[0] + range[1];
    s->first_read = range[0], s->reads = range[1], s->lines = smaller(w->strip, w->lines - s->line);
    for (; k && s->line + s->lines < to;) {
        index_t lines = s->lines + smaller(w->strip, w->lines - s->line - s->lines), first = s->first_read;
        range += 2;
        if (range[1]) {
            first = s->reads ? smaller(first, range[0]) : range[0];
            end = s->reads ? larger(end, range[0] + range[1]) : range[0] + range[1];
        }
        if (end - first > k->held || lines > k->most) break;
        s->first_read = first, s->reads = end - first, s->lines = lines;
    }
}

/* The strip where a part of all samples' strips begins, counted from the first of `sample`. */
static index_t begin(const Pass *p, const Walk *w, index_t part, index_t sample) {
    index_t strips = pieces(w->lines, w->strip);
    return p->batch * strips * part / p->parts - sample * strips;
}

/* The first sample of a part of all samples' strips, or the one behind the last. */
static index_t first_sample(const Pass *p, const Walk *w, index_t part) {
    return begin(p, w, part, 0) / pieces(w->lines, w->strip);
}
static index_t end_sample(const Pass *p, const Walk *w, index_t part) {
    return pieces(begin(p, w, part + 1, 0), pieces(w->lines, w->strip));
}

/* Call `use` for some lanes of the strips that a part has of one sample: strip by strip, in all groups, with as many
   blocks at a time as lie side by side, up to a bundle. `k` is NULL unless by planes. Return whether the part has any
   strip of the sample. */
static int walk(const Pass *p, const Walk *w, const Plane *k, const Map *map, index_t part, index_t sample,
                index_t lane, index_t lanes, float *kernels, const Memory *m,
                void (*use)(const Pass *, const Part *, const Memory *)) {
    index_t from = larger(begin(p, w, part, sample), 0) * w->strip;
    index_t to = smaller(begin(p, w, part + 1, sample) * w->strip, w->lines);
    /* Blocks of a group, and groups whose blocks lie side by side: all, if no other lanes are between them. */
    index_t blocks = pieces(lanes, LANES), joined = lanes == p->lanes && lanes % LANES == 0 ? p->lane_groups : 1;
    index_t bundles = pieces(joined * blocks, map->channel == 1 ? bundle(p) : 1);
    Part s = {.sample = sample, .tap = p->row_tap * row_step(p), .blocks = blocks};
    s.tap_line = s.tap * w->taps;
    for (s.line = from; s.line < to; s.line += s.lines) {
        find_strip(w, k, to, &s);
        for (index_t i = 0; i < p->lane_groups / joined * bundles; i++) {
            index_t group = i / bundles, end = (i % bundles + 1) * joined * blocks / bundles * LANES;
            s.block = i % bundles * joined * blocks / bundles;
            s.channel = group * p->lanes + lane + s.block * LANES;
            s.channels = smaller(end, joined * lanes) - s.block * LANES;
            s.kernels = kernels + group * p->row_lane * row_step(p), s.add = s.line > from;
            use(p, &s, m);
        }
    }
    return from < to;
}

/* Some lanes, for a part of all samples' strips. */
static void run_lanes(const Pass *p, index_t lane, index_t lanes, index_t part, const Memory *m, float *alpha_gradient,
                      float *cell_gradient, int add) {
    index_t first = first_sample(p, &p->walk, part), last = end_sample(p, &p->walk, part);
    first = smaller(first, first_sample(p, &p->kernel_walk, part));
    last = larger(last, end_sample(p, &p->kernel_walk, part));
    index_t size = p->cells * LANES, step = row_step(p), blocks = pieces(lanes, LANES), width = padded(p->cells);
    for (index_t l = 0; l < lanes; l += LANES)
        pack_cells(p, 0, lane + l, smaller(LANES, lanes - l), 0, 1, m->block + l * p->cells, LANES, size);
    if (alpha_gradient) turn_cells(p, blocks, m->block, m->turned);
    int out = p->out.data != NULL, other = p->other.data != NULL;
    int planes = out && out_by_planes(p), kernel_planes = other && kernels_by_planes(p);
    Plane k = plane_of(&p->walk, &p->source), d = plane_of(&p->kernel_walk, &p->other);
    if (planes) memset(m->source, 0, plane_size(&k) * sizeof(float));
    if (kernel_planes) memset(m->other, 0, (plane_size(&d) + d.most * d.out) * sizeof(float)); /* and the factor */
    if (out && !planes) clear_sides(&p->walk, bundle(p), m->source);
    if (other && !kernel_planes) clear_sides(&p->kernel_walk, bundle(p), m->other);
    for (index_t b = first; b < last; b += p->mixed_samples) {
        index_t samples = smaller(p->mixed_samples, last - b), rows = samples * p->rows;
        const float *alpha = p->alpha + b * p->rows * p->cells;
        for (index_t l = 0; p->out.data && l < blocks; l++)
            product(rows, 2, p->cells, alpha, p->cells, 1, m->block + l * size, LANES, m->kernels + l * LANES, step, 0);
        for (index_t i = 0; i < samples; i++) {
            float *kernels = m->kernels + i * p->rows * step;
            if (out)
                walk(p, &p->walk, planes ? &k : NULL, &p->source, part, b + i, lane, lanes, kernels, m,
                     planes ? convolve_planes : convolve);
            if (other && !walk(p, &p->kernel_walk, kernel_planes ? &d : NULL, &p->other, part, b + i, lane, lanes,
                               kernels, m, kernel_planes ? differentiate_planes : differentiate))
                memset(kernels, 0, p->rows * step * sizeof(float));
        }
        for (index_t j = 0; alpha_gradient && j < p->cells; j += LANES)
            product(rows, p->cells - j > WIDTH ? 2 : 1, blocks * LANES, m->kernels, step, 1,
                    m->turned + j * blocks * LANES, LANES, alpha_gradient + b * p->rows * width + j, width, 1);
        for (index_t l = 0; cell_gradient && l < blocks; l++)
            product(p->cells, 2, rows, alpha, 1, p->cells, m->kernels + l * LANES, step, m->gradient + l * size, LANES,
                    b > first);
    }
    for (index_t l = 0; cell_gradient && l < lanes; l += LANES)
        unpack_cells(p, 0, lane + l, smaller(LANES, lanes - l), 0, 1, m->gradient + l * p->cells, LANES, size,
                     cell_gradient, add);
}

/* A thread takes neighbouring lanes, or parts of their samples' strips. */
void kw_mix_depthwise(const Pass *p) {
    index_t items = pieces(p->lanes, p->lines) * p->parts, memory = lay_out(p, NULL, &(Memory){0});
    index_t gradients = p->batch * p->rows * padded(p->cells);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (index_t thread = 0; thread < p->threads; thread++)
        for (index_t i = items * thread / p->threads; i < items * (thread + 1) / p->threads; i++) {
            index_t part = i % p->parts, lane = i / p->parts * p->lines;
            Memory m;
            lay_out(p, p->memory + thread * memory, &m);
            run_lanes(p, lane, smaller(p->lines, p->lanes - lane), part, &m,
                      p->alpha_gradient ? p->alpha_gradient + thread * gradients : NULL,
                      p->cell_gradient ? p->cell_gradient + part * p->cells * p->cell_step : NULL,
                      p->parts > 1 || p->adds);
        }
}
