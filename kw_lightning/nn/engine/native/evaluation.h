/* A layer in evaluation as one call: attention, convolution and epilogue; layout.py declares the same fields. */

#ifndef KW_EVALUATION_H
#define KW_EVALUATION_H

#include "attention.h"

/* What a call needs but the addresses of the maps, which are arguments: so many calls, and threads, share one. In
   training it serves one direction, and has no tensor's address at all (training.h). */
typedef struct {
    Hidden hidden;     /* without x's data, and, but in training, without what is written */
    Weighing weighing; /* without hidden and alpha */
    Pass pass;         /* without the maps' data, alpha and memory */
    index_t method;    /* which pass, as numbered below */

    index_t positions;   /* kernel positions for which alpha is made, [positions, groups of mixtures, cells] */
    const int32_t *live; /* those that read anything, whose alpha the pass takes; NULL if all do */

    index_t stored; /* numbers of E; for a backward pass only */
} Evaluation;

/* From x to out. For timing: if out is NULL, only to alpha; if x is NULL, nothing but the call. */
void kw_evaluate(const Evaluation *e, float *x, float *added, float *out, float *memory);

/* Copy what the pass takes: alpha of the kernel positions that read anything. */
void take_live(const Evaluation *e, const float *alpha, float *live);

#endif
