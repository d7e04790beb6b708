/* Y (M x N) = X (M x K) W^T (N x K) + bias + residual for few rows M, or weights of few
 * bits: one pass over the weights, each row of them read once. */
#include "pool.h"
#include "vector.h"
#include "weight.h"

typedef x_t act;

#define BLOCK 4   /* rows of X that share what a row of W is converted to */
#define RUNS 4    /* of rows of W in memory that a thread reads at the same time: a core gets more
                   * from memory through several streams than through one */

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
  long tasks = MIN(2 * (long)shared->pool->threads, M * N * K / 32768);
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
  const long first = index * g->share, count = MIN(g->share, g->N - first);
  const long run = (count + RUNS - 1) / RUNS;
  for (long i = 0; i < run; i++) {
    long n[RUNS], m = 0;                  /* runs overlap where count is no multiple of RUNS */
    for (int r = 0; r < RUNS; r++) n[r] = first + r * (count - run) / (RUNS - 1) + i;
    for (; m + BLOCK <= g->M; m += BLOCK)
      for (int r = 0; r < RUNS; r++) {
        float y[BLOCK];
        dot_block(g, m, n[r], y);
        for (int j = 0; j < BLOCK; j++) put(g, m + j, n[r], y[j]);
      }
    for (; m < g->M; m++) {
      float y[RUNS];
      dot_runs(g, m, n, y);
      for (int r = 0; r < RUNS; r++) put(g, m, n[r], y[r]);
    }
  }
}
