/* Y (M x N) = X (M x K) W^T (N x K) + bias + residual for few rows M, or weights of few
 * bits: one pass over the weights, each row of them read once as a single stream. */
#include "pool.h"
#include "vector.h"
#include "weight.h"

typedef x_t act;

#define BLOCK 4   /* rows of X that share what a row of W is converted to */

typedef struct {
  const act *x, *residual;
  const float *scale, *bias;
  const weight_t* weight;
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

/* one row of X times one of W */
HOT float dot(const act* x, const weight_t* w, long K) {
  vfloat sum[4];
  UNROLL for (int i = 0; i < 4; i++) sum[i] = (vfloat)0.f;
  long k = 0;
  for (; k + 4 * LANES <= K; k += 4 * LANES) {
    __builtin_prefetch((const char*)(w + k) + 2048);
    UNROLL for (int i = 0; i < 4; i++)
      sum[i] += LOAD(x + k + i * LANES) * LOAD_WEIGHTS(w + k + i * LANES);
  }
  for (; k + LANES <= K; k += LANES) sum[0] += LOAD(x + k) * LOAD_WEIGHTS(w + k);
  float y = vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; k < K; k++) y += GET(x + k) * GET_WEIGHT(w + k);
  return y;
}

/* y = BLOCK rows of X times one of W */
HOT void dot_block(const act* x, const weight_t* w, long K, float* y) {
  vfloat sum[BLOCK][2];
  UNROLL for (int i = 0; i < BLOCK; i++) sum[i][0] = sum[i][1] = (vfloat)0.f;
  long k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES)
    UNROLL for (int j = 0; j < 2; j++) {
      const vfloat v = LOAD_WEIGHTS(w + k + j * LANES);
      UNROLL for (int i = 0; i < BLOCK; i++) sum[i][j] += LOAD(x + i * K + k + j * LANES) * v;
    }
  UNROLL for (int i = 0; i < BLOCK; i++) y[i] = vsum(sum[i][0] + sum[i][1]);
  for (; k < K; k++)
    for (int i = 0; i < BLOCK; i++) y[i] += GET(x + i * K + k) * GET_WEIGHT(w + k);
}

HOT void put(const gemv_t* g, long m, long n, float y) {
  const long at = m * g->N + n;
  if (g->scale) y *= g->scale[n];
  PUT(g->y + at, y + (g->bias ? g->bias[n] : 0.f) + (g->residual ? GET(g->residual + at) : 0.f));
}

KERNEL static void rows_of_w(void* args, int index) {
  const gemv_t* g = args;
  const long end = MIN((index + 1) * g->share, g->N);
  for (long n = index * g->share; n < end; n++) {
    const weight_t* w = g->weight + n * g->K;
    long m = 0;
    for (; m + BLOCK <= g->M; m += BLOCK) {
      float y[BLOCK];
      dot_block(g->x + m * g->K, w, g->K, y);
      for (int i = 0; i < BLOCK; i++) put(g, m + i, n, y[i]);
    }
    for (; m < g->M; m++) put(g, m, n, dot(g->x + m * g->K, w, g->K));
  }
}
