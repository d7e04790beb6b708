/* The orthogonal matrix nearest to x (R x C), roughly, by five Newton-Schulz steps
 *   x <- p(A) x,  A = x x^T,  p(A) = 3.4445 - 4.7750 A + 2.0315 A^2    (arXiv:2502.16982)
 * from x of norm 1. A and its polynomials commute, so the steps are taken on A (N x N), N the lesser
 * of R and C, and their product is applied to x once. All of them are symmetric, which halves the
 * work, and made so to the bit: what is not grows at every step. scratch (4 x N x N). */
#include "gemm.h"
#include "square_sum.h"

static void some_squares(void* args, int index);

typedef struct {
  const float* x;
  double* sums;
  long n;
} squares_t;

#define TASKS 16

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

KERNEL void NAME(float* out, float* scratch, const float* x, const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  void* packed = (void*)table[1];
  const long R = dims[0], C = dims[1], N = MIN(R, C), wide = R <= C;
  float *A = scratch, *step = A + N * N, *all = step + N * N, *next = all + N * N;
  double sums[TASKS], total = 0;
  squares_t squares = {x, sums, R * C};
  parallel_for(pool, some_squares, &squares, TASKS);
  for (int i = 0; i < TASKS; i++) total += sums[i];
  const float norm = __builtin_sqrtf((float)total) + 1e-7f, shrink = 1.0f / (norm * norm);
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

KERNEL static void some_squares(void* args, int index) {
  const squares_t* s = args;
  s->sums[index] = square_sum(s->x, s->n * index / TASKS, s->n * (index + 1) / TASKS);
}

#include "gemm_float.h"
