/* Y (M x N) = X (M x K) W^T (N x K) + bias + residual for few rows M: one pass over the weights,
 * each row of them read once as a single stream. */
#include "pool.h"
#include "vector.h"
#include "operands.h"

typedef struct {
  const a_t* x;
  const b_t* w;
  const float* bias;
  const c_t* residual;
  c_t* y;
  long M, N, K, share;
} gemv_t;

static void rows_of_w(void* args, int index);

KERNEL void NAME(ARGUMENTS const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  gemv_t g = {.x = a, .w = b, .bias = BIAS, .residual = RESIDUAL, .y = c,
              .M = dims[0], .N = dims[1], .K = dims[2]};
  long tasks = MIN(4 * (long)pool->threads, g.N * g.K / 32768);
  tasks = MAX(MIN(tasks, g.N), 1);
  g.share = (g.N + tasks - 1) / tasks;
  parallel_for(pool, rows_of_w, &g, (g.N + g.share - 1) / g.share);
}

KERNEL static void rows_of_w(void* args, int index) {
  const gemv_t* g = args;
  const long end = MIN((index + 1) * g->share, g->N);
  for (long n = index * g->share; n < end; n++)
    for (long m = 0; m < g->M; m++) {
      const a_t* x = g->x + m * g->K;
      const b_t* w = g->w + n * g->K;
      vfloat sum[4];
      UNROLL for (int i = 0; i < 4; i++) sum[i] = (vfloat)0.f;
      long k = 0;
      for (; k + 4 * LANES <= g->K; k += 4 * LANES) {
        __builtin_prefetch((const char*)(w + k) + 2048);
        UNROLL for (int i = 0; i < 4; i++)
          sum[i] += LOAD(x + k + i * LANES) * LOAD(w + k + i * LANES);
      }
      for (; k + LANES <= g->K; k += LANES) sum[0] += LOAD(x + k) * LOAD(w + k);
      float y = vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      for (; k < g->K; k++) y += GET(x + k) * GET(w + k);
      const long at = m * g->N + n;
      PUT(g->y + at, y + (g->bias ? g->bias[n] : 0.f) + (g->residual ? GET(g->residual + at) : 0.f));
    }
}
