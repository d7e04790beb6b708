/* One Muon step (arXiv:2502.16982) on COUNT weights p (R x C) and their momenta m, in place.
 *
 * The direction is the orthogonal matrix nearest to x = grad + momentum * m, roughly, by five
 * Newton-Schulz steps
 *   x <- p(A) x,  A = x x^T,  p(A) = 3.4445 - 4.7750 A + 2.0315 A^2
 * from x of norm 1. A and its polynomials commute, so the steps are taken on A (N x N), N the lesser
 * of R and C, and their product is applied to x once. All of them are symmetric, which halves the
 * work, and exactly so, since any asymmetry grows at every step.
 *
 * Each thread takes a matrix at a time; where there are more threads than matrices, all of them work
 * on each. scratch is, for each thread that takes a matrix, what one needs: 2 R C + 4 N N. */
#define a_t float
#define b_t float
#define c_t float
#include "gemm.h"
#include "square_sum.h"

#define PACKED (KC * NC)        /* floats of B that a product packs */

typedef struct { float OPTIONS; } muon_options_t; /* options.py has the names */

typedef struct {
  float **p, **m;
  const float** grad;
  const long *R, *C;            /* of every weight */
  const muon_options_t* options;
  float *scratch, *packed;
  long room;                    /* of scratch for a thread */
  int next;                     /* the weight to be taken */
} weights_t;

/* elements of one weight, for a part of the threads */
typedef struct {
  float *p, *m, *x;
  const float *grad, *direction;
  const muon_options_t* options;
  long n, tasks;
  float size;                   /* of a step: 0.2 sqrt(max(R, C)), the root mean square of AdamW's */
} elements_t;

static void some_weights(void* args, int index);
static void update(pool_t* pool, const weights_t* w, int which, int slot);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  pool_t* pool = shared->pool;
  const long packings = shared->workspace_bytes / sizeof(float) / PACKED;
  weights_t w = {.p = p, .m = m, .grad = grad, .R = R, .C = C, .scratch = scratch, .room = room,
                 .options = (const muon_options_t*)options, .packed = shared->workspace};
  if (w.options->apply == 0.f) return;
  if (COUNT < pool->threads)
    for (int i = 0; i < COUNT; i++) update(pool, &w, i, 0);
  else
    parallel_for(pool, some_weights, &w, MIN((long)pool->threads, packings));
}

KERNEL static void some_weights(void* args, int index) {
  weights_t* w = args;
  pool_t alone;                 /* of which a pool of one needs no more */
  alone.threads = 1;
  int i;
  while ((i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < COUNT)
    update(&alone, w, i, index);
}

KERNEL static void some_momenta(void* args, int index) {
  const elements_t* e = args;
  const float momentum = e->options->momentum, scale = e->options->grad_scale;
  const long end = e->n * (index + 1) / e->tasks;
  for (long i = e->n * index / e->tasks; i < end; i++) {
    const float g = e->grad[i] * scale, m = momentum * e->m[i] + g;
    e->m[i] = m;
    e->x[i] = g + momentum * m;
  }
}

KERNEL static void some_elements(void* args, int index) {
  const elements_t* e = args;
  const float lr = e->options->learning_rate, kept = 1.f - lr * e->options->weight_decay;
  const long end = e->n * (index + 1) / e->tasks;
  for (long i = e->n * index / e->tasks; i < end; i++)
    e->p[i] = e->p[i] * kept - lr * e->size * e->direction[i];
}

/* c = op(a) op(b), c of m x n */
HOT void multiply_matrices(pool_t* pool, void* packed, float* c, const float* a, const float* b,
                           long m, long n, long k, int ta, int tb, int symmetric) {
  gemm_t g = {.a = a, .b = b, .c = c, .packed_b = packed, .M = m, .N = n, .K = k,
              .ta = ta, .tb = tb, .symmetric = symmetric};
  product(pool, &g);
}

/* c = a b of symmetric n x n matrices that commute */
HOT void multiply_symmetric(pool_t* pool, void* packed, float* c, const float* a, const float* b,
                            long n) {
  multiply_matrices(pool, packed, c, a, b, n, n, n, 0, 0, 1);
}

/* out = the orthogonal matrix nearest to x (R x C); scratch 4 N N */
HOT void orthogonalize(pool_t* pool, float* out, const float* x, long R, long C, float* scratch,
                       float* packed) {
  const long N = MIN(R, C), wide = R <= C;
  float *A = scratch, *step = A + N * N, *all = step + N * N, *next = all + N * N;
  const float norm = __builtin_sqrtf((float)square_sum(x, 0, R * C)) + 1e-7f;
  const float shrink = 1.0f / (norm * norm);
  multiply_matrices(pool, packed, A, x, x, N, N, MAX(R, C), !wide, wide, 1);
  for (long i = 0; i < N * N; i++) A[i] *= shrink;
  for (int round = 0; round < 5; round++) {
    multiply_symmetric(pool, packed, step, A, A, N);
    for (long i = 0; i < N * N; i++) step[i] = 2.0315f * step[i] - 4.7750f * A[i];
    for (long i = 0; i < N; i++) step[i * N + i] += 3.4445f;
    if (round) {
      multiply_symmetric(pool, packed, next, all, step, N);
      float* before = all;
      all = next, next = before;
    } else {
      for (long i = 0; i < N * N; i++) all[i] = step[i];
    }
    if (round == 4) break;
    multiply_symmetric(pool, packed, next, step, A, N);
    multiply_symmetric(pool, packed, A, next, step, N);
  }
  for (long i = 0; i < N * N; i++) all[i] /= norm;
  if (wide) multiply_matrices(pool, packed, out, all, x, R, C, N, 0, 0, 0);
  else multiply_matrices(pool, packed, out, x, all, R, C, N, 0, 0, 0);
}

KERNEL static void update(pool_t* pool, const weights_t* w, int which, int slot) {
  const long R = w->R[which], C = w->C[which], n = R * C;
  float *x = w->scratch + slot * w->room, *direction = x + n;
  elements_t e = {.p = w->p[which], .m = w->m[which], .grad = w->grad[which], .x = x,
                  .direction = direction, .options = w->options, .n = n,
                  .tasks = MAX(1, MIN((long)pool->threads, n / 16384)),
                  .size = 0.2f * __builtin_sqrtf((float)MAX(R, C))};
  parallel_for(pool, some_momenta, &e, e.tasks);
  orthogonalize(pool, direction, x, R, C, direction + n, w->packed + slot * PACKED);
  parallel_for(pool, some_elements, &e, e.tasks);
}

#include "gemm_float.h"
