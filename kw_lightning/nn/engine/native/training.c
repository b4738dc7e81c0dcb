/* Forward the attention, then the pass; backwards the pass, the attention, and the means' gradient over the map. */

#include "training.h"

index_t kw_weigh_memory(const Weighing *p);
void kw_weigh(const Weighing *p);
void kw_weigh_backward(const Weighing *p);
void kw_hidden_backward(const Hidden *p);
index_t kw_evaluate_memory(const Evaluation *e);

index_t kw_mix_kernels_memory(const Pass *p);
index_t kw_mix_inputs_backward_memory(const Pass *p);
index_t kw_mix_depthwise_memory(const Pass *p);
index_t kw_mix_lines_backward_memory(const Pass *p);
index_t kw_mix_rows_backward_memory(const Pass *p);
void kw_mix_kernels(const Pass *p);
void kw_mix_inputs_backward(const Pass *p);
void kw_mix_depthwise(const Pass *p);
void kw_mix_lines_backward(const Pass *p);
void kw_mix_rows_backward(const Pass *p);

/* By method, backwards. */
static index_t (*const memory_of[])(const Pass *) = {kw_mix_kernels_memory, kw_mix_inputs_backward_memory,
                                                     kw_mix_depthwise_memory, kw_mix_lines_backward_memory,
                                                     kw_mix_rows_backward_memory};
static void (*const run[])(const Pass *) = {kw_mix_kernels, kw_mix_inputs_backward, kw_mix_depthwise,
                                            kw_mix_lines_backward, kw_mix_rows_backward};

/* Lay out in `kept` what the backward pass needs of the attention; return how many numbers. */
static index_t keep(Hidden *p, float *at) {
    float *start = at;
    index_t groups = padded(p->statistics == OF_SAMPLE ? p->batch : p->width);
    p->pooled = at, at += padded(p->batch * p->channels);
    p->raw = at, at += padded(p->batch * p->width);
    p->hidden = at, at += padded(p->batch * p->width);
    if (p->statistics == GIVEN) return at - start;
    p->mean = at, at += groups;
    p->variance = at, at += groups;
    return at - start;
}

index_t kw_kept_memory(const Evaluation *e) {
    Hidden hidden = e->hidden;
    return keep(&hidden, NULL);
}

static Hidden tell_hidden(const Evaluation *e, const Tensors *t) {
    Hidden hidden = e->hidden;
    keep(&hidden, t->kept);
    hidden.momentum = t->momentum;
    hidden.reduce = t->reduce, hidden.bias = t->reduce_bias, hidden.scale = t->scale, hidden.shift = t->shift;
    if (hidden.statistics == GIVEN)
        hidden.mean = t->running_mean, hidden.variance = t->running_variance;
    else
        hidden.running_mean = t->running_mean, hidden.running_variance = t->running_variance;
    return hidden;
}

static Weighing tell_weighing(const Evaluation *e, const Tensors *t) {
    Weighing weighing = e->weighing;
    weighing.weight = t->weight, weighing.bias = t->bias;
    weighing.temperature = t->temperature, weighing.initial = t->initial;
    return weighing;
}

index_t kw_train_memory(const Evaluation *e) { return kw_evaluate_memory(e); }

/* From x to y. For timing: if y is NULL, only to alpha; if x is NULL, nothing but the call. */
void kw_train(const Evaluation *e, const Tensors *t) {
    Evaluation told = *e;
    told.hidden = tell_hidden(e, t), told.weighing = tell_weighing(e, t);
    told.pass.cell = t->cells;
    kw_evaluate(&told, t->x, NULL, t->y, t->memory);
}

typedef struct {
    float *alpha, *live;  /* as in kw_evaluate */
    float *row_gradients; /* each thread's, of alpha as the pass takes it, rows padded */
    float *alpha_gradient;
    float *hidden_gradient; /* becomes that of raw */
    float *means_gradient;
    float *cell_gradients; /* each part's */
    float *rest;
} Memory;

static index_t lay_out(const Evaluation *e, float *at, Memory *m) {
    Pass pass = e->pass;
    Weighing weighing = e->weighing;
    float *start = at;
    m->alpha = at, at += padded(weighing.batch * weighing.mixtures * pass.cells);
    m->live = at, at += e->live ? padded(pass.batch * pass.rows * pass.cells) : 0;
    m->row_gradients = at, at += pass.threads * pass.batch * pass.rows * padded(pass.cells);
    m->alpha_gradient = at, at += padded(weighing.batch * weighing.mixtures * pass.cells);
    m->hidden_gradient = at, at += padded(weighing.batch * weighing.width);
    m->means_gradient = at, at += padded(weighing.batch * e->hidden.channels);
    m->cell_gradients = at, at += pass.parts > 1 ? padded(pass.parts * e->stored) : 0;
    m->rest = at;
    /* The memory depends on which gradients are wanted: count all of them. */
    float there;
    index_t forward = kw_weigh_memory(&weighing);
    weighing.weight_gradient = pass.alpha_gradient = pass.cell_gradient = &there;
    at += larger(larger(forward, kw_weigh_memory(&weighing)), memory_of[e->method](&pass));
    return at - start;
}

index_t kw_train_backward_memory(const Evaluation *e) { return lay_out(e, NULL, &(Memory){0}); }

/* The gradients of the map and of the cells, and each thread's part of alpha's. */
static void differentiate(const Evaluation *e, const Tensors *t, const Memory *m) {
    Pass pass = e->pass;
    pass.source.data = t->gradient, pass.other.data = t->x, pass.out.data = t->x_gradient;
    pass.alpha = e->live ? m->live : m->alpha, pass.cell = t->cells;
    if (e->live) take_live(e, m->alpha, m->live);
    pass.alpha_gradient = m->row_gradients;
    memset(m->row_gradients, 0, pass.threads * pass.batch * pass.rows * padded(pass.cells) * sizeof(float));
    pass.cell_gradient = t->cell_gradient, pass.adds = t->adds;
    if (t->cell_gradient && pass.parts > 1) {
        pass.cell_gradient = m->cell_gradients;
        memset(m->cell_gradients, 0, pass.parts * e->stored * sizeof(float));
    }
    pass.memory = m->rest;
    run[e->method](&pass);
    if (!t->cell_gradient || pass.parts == 1) return;
#pragma omp parallel for simd schedule(static) num_threads(pass.threads)
    for (index_t i = 0; i < e->stored; i++) {
        float sum = t->adds ? t->cell_gradient[i] : 0;
        for (index_t part = 0; part < pass.parts; part++) sum += m->cell_gradients[part * e->stored + i];
        t->cell_gradient[i] = sum;
    }
}

/* Add up the threads' parts of alpha's gradient, laid out as by the attention: 0 at positions that read nothing. */
static void gather(const Evaluation *e, const Memory *m) {
    const Pass *p = &e->pass;
    index_t row = padded(p->cells), each = p->batch * p->rows * row, mixtures = e->weighing.mixtures;
    if (e->live) memset(m->alpha_gradient, 0, p->batch * mixtures * p->cells * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(e->weighing.threads)
    for (index_t i = 0; i < p->batch * p->rows; i++) {
        index_t b = i / p->rows, r = i % p->rows, tap = r / p->row_tap;
        index_t mixture = e->live ? e->live[tap] * p->row_tap + r % p->row_tap : r;
        const float *from = m->row_gradients + i * row;
        float *to = m->alpha_gradient + (b * mixtures + mixture) * p->cells;
        memcpy(to, from, p->cells * sizeof(float));
        for (index_t thread = 1; thread < p->threads; thread++)
#pragma omp simd
            for (index_t j = 0; j < p->cells; j++) to[j] += from[thread * each + j];
    }
}

/* Add the gradient of the means to that of every position of a map. */
static void spread(const Evaluation *e, const float *means, float *gradient) {
    const Map *map = &e->pass.out;
    index_t channels = e->hidden.channels;
    int first = map->position == 1; /* channels */
    index_t runs = first ? channels : map->positions;
#pragma omp parallel for schedule(static) num_threads(e->hidden.threads)
    for (index_t i = 0; i < e->pass.batch * runs; i++) {
        index_t b = i / runs, at = i % runs;
        const float *from = means + b * channels;
        float *to = gradient + b * map->batch + at * (first ? map->channel : map->position);
        if (first)
#pragma omp simd
            for (index_t p = 0; p < map->positions; p++) to[p] += from[at];
        else
#pragma omp simd
            for (index_t c = 0; c < channels; c++) to[c] += from[c];
    }
}

/* From the gradient of y to all others. For timing: if gradient is NULL, only the attention's; if x is NULL, none. */
void kw_train_backward(const Evaluation *e, const Tensors *t) {
    Memory m;
    if (!t->x) return;
    lay_out(e, t->memory, &m);
    Hidden hidden = tell_hidden(e, t);
    Weighing weighing = tell_weighing(e, t);
    weighing.hidden = hidden.hidden, weighing.alpha = m.alpha, weighing.memory = m.rest;
    kw_weigh(&weighing);
    if (t->gradient) differentiate(e, t, &m);
    gather(e, &m);
    weighing.alpha = t->gradient ? m.alpha_gradient : m.alpha, weighing.hidden_gradient = m.hidden_gradient;
    weighing.weight_gradient = t->weight_gradient, weighing.bias_gradient = t->bias_gradient;
    kw_weigh_backward(&weighing);
    hidden.gradient = m.hidden_gradient, hidden.x_gradient = t->x_gradient ? m.means_gradient : NULL;
    hidden.scale_gradient = t->scale_gradient, hidden.shift_gradient = t->shift_gradient;
    hidden.reduce_gradient = t->reduce_gradient, hidden.bias_gradient = t->reduce_bias_gradient;
    kw_hidden_backward(&hidden);
    if (t->x_gradient) spread(e, m.means_gradient, t->x_gradient);
}
