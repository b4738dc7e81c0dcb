/* A layer as one call, from its input to what becomes of its output; layout.py declares the same. */

#ifndef KW_EVALUATION_H
#define KW_EVALUATION_H

#include "attention.h"

/* What a call needs but for the maps' places, which are told beside it: many calls, and threads, share one. */
typedef struct {
    Hidden hidden;     /* without x's data, and what is written, but in training */
    Weighing weighing; /* without hidden and alpha */
    Pass pass;         /* without the maps' data, alpha and memory */
    index_t method;    /* which pass, as numbered below */

    index_t positions;   /* of the kernel, of which alpha is made, [positions, groups of mixtures, cells] */
    const int32_t *live; /* those that read anything, of which the pass takes it; NULL where all do */

    index_t stored; /* numbers of all cells; of a backward pass alone */
} Evaluation;

/* From x to out; to be timed, out NULL: to alpha only, and x NULL: nothing but the call. */
void kw_evaluate(const Evaluation *e, float *x, float *added, float *out, float *memory);

/* What the pass takes: alpha of the positions that read anything. */
void take_live(const Evaluation *e, const float *alpha, float *live);

#endif
