/* The orthogonal matrix nearest to each of COUNT matrices x (R x C), roughly, by five Newton-Schulz
 * steps
 *   x <- p(A) x,  A = x x^T,  p(A) = 3.4445 - 4.7750 A + 2.0315 A^2    (arXiv:2502.16982)
 * from x of norm 1. A and its polynomials commute, so the steps are taken on A (N x N), N the lesser
 * of R and C, and their product is applied to x once. All of them are symmetric, which halves the
 * work, and exactly so, since any asymmetry grows at every step.
 *
 * Each thread takes a matrix at a time; where there are more threads than matrices, all of them work
 * on each product. scratch is 4 x N x N, of the largest N, for each thread that takes a matrix. */
#define a_t float
#define b_t float
#define c_t float
#include "gemm.h"
#include "square_sum.h"

#define PACKED (KC * NC)        /* floats of B that a product packs */

typedef struct {
  float** out;
  const float** x;
  const long *R, *C;            /* of every matrix */
  float *scratch, *packed;
  long largest;                 /* N */
  int next;                     /* the matrix to be taken */
} matrices_t;

static void some_matrices(void* args, int index);
static void orthogonalize(pool_t* pool, const matrices_t* m, int which, int slot);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  pool_t* pool = shared->pool;
  const long room = shared->workspace_bytes / sizeof(float) / PACKED;
  matrices_t m = {.out = out, .x = x, .R = R, .C = C, .scratch = scratch,
                  .packed = shared->workspace};
  for (int i = 0; i < COUNT; i++) m.largest = MAX(m.largest, MIN(R[i], C[i]));
  if (COUNT < pool->threads)
    for (int i = 0; i < COUNT; i++) orthogonalize(pool, &m, i, 0);
  else
    parallel_for(pool, some_matrices, &m, MIN((long)pool->threads, room));
}

KERNEL static void some_matrices(void* args, int index) {
  matrices_t* m = args;
  pool_t alone;                 /* of which a pool of one needs no more */
  alone.threads = 1;
  int i;
  while ((i = __atomic_fetch_add(&m->next, 1, __ATOMIC_RELAXED)) < COUNT)
    orthogonalize(&alone, m, i, index);
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

KERNEL static void orthogonalize(pool_t* pool, const matrices_t* m, int which, int slot) {
  const float* x = m->x[which];
  const long R = m->R[which], C = m->C[which], N = MIN(R, C), wide = R <= C;
  float *packed = m->packed + slot * PACKED, *out = m->out[which];
  float *A = m->scratch + slot * 4 * m->largest * m->largest;
  float *step = A + N * N, *all = step + N * N, *next = all + N * N;
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

#include "gemm_float.h"
