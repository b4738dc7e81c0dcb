/* The arguments of the attention's two steps; layout.py declares the same fields, see pass.h. */

#ifndef KW_ATTENTION_H
#define KW_ATTENTION_H

#include "pass.h"

/* Where the norm's mean and variance are from: given, of the whole batch, or of each sample. */
enum { GIVEN, OF_BATCH, OF_SAMPLE };

/* From a map to the hidden activations: mean, reduce, norm, ReLU. Backwards up to the gradient of the means, which is
   not yet spread over the map. */
typedef struct {
    index_t batch, channels, width, threads;
    index_t statistics;     /* see above */
    double epsilon;         /* of the norm */
    double momentum;        /* how far running statistics move towards the batch's */
    Map x;                  /* of `channels` channels, not empty; its data NULL where `pooled` is given */
    float *pooled;          /* [batch, channels]; written forward unless given */
    const float *reduce;    /* [width, channels] */
    const float *bias;      /* of reduce, [width]; NULL for none */
    const float *scale;     /* of the norm, [width] */
    const float *shift;     /* of the norm, [width] */
    float *mean, *variance; /* [width], or [batch] where they are a sample's; written forward unless given */
    float *running_mean, *running_variance; /* [width], of all batches, changed forward; NULL for none */
    float *raw;                             /* what is normalised, [batch, width]; written forward */
    float *hidden;                          /* [batch, width]; written forward */
    float *gradient;                        /* backwards: of hidden, [batch, width]; becomes that of raw */
    float *scale_gradient, *shift_gradient; /* backwards: [width], written */
    float *x_gradient;      /* backwards: of one position's x, [batch, channels]; written, NULL for none */
    float *reduce_gradient; /* backwards: as reduce; likewise */
    float *bias_gradient;   /* backwards: as bias; likewise */
} Hidden;

/* From the hidden activations to alpha, or to sizes alone, and backwards.

       z = weight hidden + bias,  alpha[j] = temperature * (j == initial) + share * z[j] for j < cells,
       share = (1 - temperature) / size,  size = 0.001 + sum of |z| over all cells + 1 columns.

   The last column is the zero cell's. */
typedef struct {
    index_t batch, mixtures, cells, width, threads;
    const float *hidden;      /* [batch, width] */
    const float *weight;      /* [mixtures, cells + 1, width] */
    const float *bias;        /* [mixtures, cells + 1] */
    const float *temperature; /* a number */
    const int64_t *initial;   /* [mixtures] */
    float *alpha;             /* [batch, mixtures, cells]; written forward, and backwards its gradient, read */
    float *sizes;             /* [batch, mixtures]; likewise, where alpha is NULL */
    float *hidden_gradient;   /* backwards: as hidden, written */
    float *weight_gradient;   /* backwards: as weight, written */
    float *bias_gradient;     /* backwards: as bias, written */
    float *memory;            /* of as many numbers as kw_weigh_memory says */
} Weighing;

#endif
