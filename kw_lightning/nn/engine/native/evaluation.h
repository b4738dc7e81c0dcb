/* A layer in evaluation, as one call from its input to what becomes of its output; layout.py declares the same. */

#ifndef KW_EVALUATION_H
#define KW_EVALUATION_H

#include "attention.h"

/* What a call needs but for the maps' places, which are told beside it: many calls, and threads, share one. */
typedef struct {
    Hidden hidden;     /* without x's data, and what is written */
    Weighing weighing; /* without hidden and alpha */
    Pass pass;         /* without the maps' data, alpha and memory */
    index_t method;    /* which pass, as numbered below */

    /* Alpha of taps, [taps, groups of mixtures, cells], by that of kernel positions, [positions, ...]: a matrix [taps,
       positions], as native/positions.py has it; NULL where they are the same. */
    index_t positions;
    const float *transform;
} Evaluation;

enum { BY_KERNELS, BY_INPUTS, BY_CHANNELS, BY_LINES };

#endif
