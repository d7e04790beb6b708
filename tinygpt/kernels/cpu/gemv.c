/* Y (M x N) = X (M x K) W^T (N x K) + bias + residual for few rows M, or weights of few
 * bits: one pass over the weights, each row of them read once as a single stream. */
#include "pool.h"
#include "vector.h"
#include "weight.h"

typedef x_t act;

#define BLOCK 4   /* rows of X that share what a row of W is converted to */

typedef struct {
  const act *x, *residual;
  const weight_t* weight;
  const scale_t* scale;
  const float* bias;
  act* y;
  long M, N, K, share;
} gemv_t;

static void rows_of_w(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  gemv_t g = {.x = x, .weight = weight, .scale = scale, .bias = bias, .residual = residual,
              .y = y, .M = M, .N = N, .K = K};
  long tasks = MIN(4 * (long)shared->pool->threads, M * N * K / 32768);
  tasks = MAX(MIN(tasks, N), 1);
  g.share = (N + tasks - 1) / tasks;
  parallel_for(shared->pool, rows_of_w, &g, (N + g.share - 1) / g.share);
}

#if INT4
#include "dot_int4.h"
#else
#include "dot.h"
#endif

HOT void put(const gemv_t* g, long m, long n, float y) {
  const long at = m * g->N + n;
  PUT(g->y + at, y + (g->bias ? g->bias[n] : 0.f) + (g->residual ? GET(g->residual + at) : 0.f));
}

KERNEL static void rows_of_w(void* args, int index) {
  const gemv_t* g = args;
  const long end = MIN((index + 1) * g->share, g->N);
  for (long n = index * g->share; n < end; n++) {
    long m = 0;
    for (; m + BLOCK <= g->M; m += BLOCK) {
      float y[BLOCK];
      dot_block(g, m, n, y);
      for (int i = 0; i < BLOCK; i++) put(g, m + i, n, y[i]);
    }
    for (; m < g->M; m++) put(g, m, n, dot(g, m, n));
  }
}
