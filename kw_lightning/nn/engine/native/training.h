/* A layer in training as one call forward and one backwards; layout.py declares the same fields. */

#ifndef KW_TRAINING_H
#define KW_TRAINING_H

#include "evaluation.h"

/* The addresses of a layer's tensors. The `Evaluation` of a direction, which is passed beside them, has none, so that
   threads can share it. */
typedef struct {
    float *x;            /* the input */
    float *y;            /* forward: the output, written */
    float *kept;         /* of as many numbers as kw_kept_memory says: written forward, read backwards */
    float *memory;       /* of as many as kw_train_memory says, or kw_train_backward_memory */
    double momentum;     /* as in `Hidden` */
    const float *cells;  /* E */
    const float *reduce; /* as in `Hidden`, with the next three */
    const float *reduce_bias;
    const float *scale, *shift;
    const float *weight, *bias; /* as in `Weighing`, with the next two */
    const float *temperature;
    const int64_t *initial;
    float *running_mean, *running_variance; /* as in `Hidden` */
    float *gradient;                        /* backwards: of y */
    float *x_gradient;                      /* backwards: written; NULL if not wanted */
    index_t adds;                           /* whether cell_gradient is added to */
    float *cell_gradient;                   /* backwards: written, with the next six; NULL if not wanted */
    float *reduce_gradient;
    float *reduce_bias_gradient; /* NULL for none */
    float *scale_gradient, *shift_gradient;
    float *weight_gradient, *bias_gradient;
} Tensors;

#endif
