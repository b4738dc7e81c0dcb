/* The attention, then the pass, with all that they hand over in one piece of memory. */

#include "evaluation.h"

index_t kw_weigh_memory(const Weighing *p);
void kw_hidden(const Hidden *p);
void kw_weigh(const Weighing *p);

index_t kw_mix_kernels_memory(const Pass *p);
index_t kw_mix_inputs_memory(const Pass *p);
index_t kw_mix_depthwise_memory(const Pass *p);
index_t kw_mix_lines_memory(const Pass *p);
index_t kw_mix_rows_memory(const Pass *p);
void kw_mix_kernels(const Pass *p);
void kw_mix_inputs(const Pass *p);
void kw_mix_depthwise(const Pass *p);
void kw_mix_lines(const Pass *p);
void kw_mix_rows(const Pass *p);

/* By method. */
static index_t (*const memory_of[])(const Pass *) = {kw_mix_kernels_memory, kw_mix_inputs_memory,
                                                     kw_mix_depthwise_memory, kw_mix_lines_memory, kw_mix_rows_memory};
static void (*const run[])(const Pass *) = {kw_mix_kernels, kw_mix_inputs, kw_mix_depthwise, kw_mix_lines, kw_mix_rows};

typedef struct {
    float *pooled, *raw, *hidden, *mean, *variance, *alpha, *live, *rest;
} Memory;

static index_t lay_out(const Evaluation *e, float *at, Memory *m) {
    const Weighing *w = &e->weighing;
    float *start = at;
    m->pooled = at, at += padded(e->hidden.batch * e->hidden.channels);
    m->raw = at, at += padded(w->batch * w->width);
    m->hidden = at, at += padded(w->batch * w->width);
    m->mean = at, at += padded(w->batch);
    m->variance = at, at += padded(w->batch);
    m->alpha = at, at += padded(w->batch * w->mixtures * w->cells);
    m->live = at, at += e->live ? padded(e->pass.batch * e->pass.rows * e->pass.cells) : 0;
    m->rest = at, at += larger(kw_weigh_memory(w), memory_of[e->method](&e->pass));
    return at - start;
}

index_t kw_evaluate_memory(const Evaluation *e) { return lay_out(e, NULL, &(Memory){0}); }

void take_live(const Evaluation *e, const float *alpha, float *live) {
    index_t width = e->pass.row_tap * e->pass.cells;
    for (index_t b = 0; b < e->pass.batch; b++, alpha += e->positions * width)
        for (index_t t = 0; t < e->pass.taps; t++, live += width) copy(alpha + e->live[t] * width, live, width);
}

void kw_evaluate(const Evaluation *e, float *x, float *added, float *out, float *memory) {
    Memory m;
    if (!x) return;
    lay_out(e, memory, &m);
    Hidden hidden = e->hidden;
    hidden.x.data = x;
    if (!hidden.hidden) hidden.pooled = m.pooled, hidden.raw = m.raw, hidden.hidden = m.hidden;
    if (!hidden.mean) hidden.mean = m.mean, hidden.variance = m.variance;
    kw_hidden(&hidden);
    Weighing weighing = e->weighing;
    weighing.hidden = hidden.hidden, weighing.alpha = m.alpha, weighing.memory = m.rest;
    kw_weigh(&weighing);
    if (!out) return;
    Pass pass = e->pass;
    pass.source.data = x, pass.epilogue.added.data = added, pass.out.data = out;
    pass.alpha = e->live ? m.live : m.alpha, pass.memory = m.rest;
    if (e->live) take_live(e, m.alpha, m.live);
    run[e->method](&pass);
}
