/* LayerNorm (arXiv:1607.06450), or with RMS 1 RMSNorm (arXiv:1910.07467), of each row of x (N x C).
 * stats (N x 2) keeps the mean and 1 / standard deviation of a row for the backward pass. */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const act* x;
  const float *weight, *bias;
  act* y;
  float *stats, eps;
  long N, C, tasks;
} norm_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  norm_t g = {.x = x, .weight = weight, .bias = bias, .y = y, .stats = stats, .eps = eps,
              .N = N, .C = C};
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, N / 16));
  parallel_for(shared->pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const norm_t* g = args;
  const long C = g->C, end = VECTOR_END(C);
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const act* x = g->x + i * C;
    act* y = g->y + i * C;
    float mean = 0.f;
    long c;
#if !RMS
    vfloat sum = (vfloat)0.f;
    for (c = 0; c < end; c += LANES) sum += LOAD(x + c);
    mean = vsum(sum);
    for (; c < C; c++) mean += GET(x + c);
    mean /= C;
#endif
    vfloat squares = (vfloat)0.f;
    for (c = 0; c < end; c += LANES) {
      const vfloat z = LOAD(x + c) - mean;
      squares += z * z;
    }
    float variance = vsum(squares);
    for (; c < C; c++) variance += (GET(x + c) - mean) * (GET(x + c) - mean);
    const float scale = 1.0f / __builtin_sqrtf(variance / C + g->eps);
    for (c = 0; c < end; c += LANES) {
      vfloat z = (LOAD(x + c) - mean) * scale * LOAD(g->weight + c);
      STORE(y + c, g->bias ? z + LOAD(g->bias + c) : z);
    }
    for (; c < C; c++)
      PUT(y + c, (GET(x + c) - mean) * scale * g->weight[c] + (g->bias ? g->bias[c] : 0.f));
    g->stats[2 * i] = mean;
    g->stats[2 * i + 1] = scale;
  }
}
