/* The gradients of LayerNorm or RMSNorm: with h = (x - mean) * scale and g = dy * weight,
 *   dx = scale * (g - mean(g) - h * mean(g * h)),  dweight = sum(dy * h),  dbias = sum(dy)
 * where RMSNorm has no mean(g). Each task sums dweight and dbias over its own rows; the sums of the
 * tasks are added at the end, always in the same order. */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const act *dy, *x;
  const float *weight, *stats;
  act* dx;
  float* partial;               /* (tasks x 2 x C): dweight, dbias */
  long N, C, tasks;
} norm_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  float* bias_sums = dbias;
  norm_t g = {.dy = dy, .x = x, .weight = weight, .stats = stats, .dx = dx,
              .partial = shared->workspace, .N = N, .C = C};
  const long room = shared->workspace_bytes / (2 * C * sizeof(float));
  g.tasks = MAX(1, MIN(MIN(4 * (long)shared->pool->threads, N / 16), room));
  parallel_for(shared->pool, some_rows, &g, g.tasks);
  for (long c = 0; c < C; c++) {
    float w = 0.f, b = 0.f;
    for (long t = 0; t < g.tasks; t++) {
      w += g.partial[2 * t * C + c];
      b += g.partial[(2 * t + 1) * C + c];
    }
    dweight[c] = w;
    if (bias_sums) bias_sums[c] = b;
  }
}

KERNEL static void some_rows(void* args, int index) {
  const norm_t* g = args;
  const long C = g->C, end = VECTOR_END(C);
  float *dweight = g->partial + 2 * index * C, *dbias = dweight + C;
  for (long c = 0; c < 2 * C; c++) dweight[c] = 0.f;
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const act *x = g->x + i * C, *dy = g->dy + i * C;
    act* dx = g->dx + i * C;
    const float* w = g->weight;
    const float mean = g->stats[2 * i], scale = g->stats[2 * i + 1];
    vfloat sum_g = (vfloat)0.f, sum_gh = (vfloat)0.f;
    long c;
    for (c = 0; c < end; c += LANES) {
      const vfloat d = LOAD(dy + c), h = (LOAD(x + c) - mean) * scale, z = d * LOAD(w + c);
      sum_g += z;
      sum_gh += z * h;
      STORE(dweight + c, LOAD(dweight + c) + d * h);
      STORE(dbias + c, LOAD(dbias + c) + d);
    }
    float mean_g = vsum(sum_g), mean_gh = vsum(sum_gh);
    for (; c < C; c++) {
      const float d = GET(dy + c), h = (GET(x + c) - mean) * scale;
      mean_g += d * w[c];
      mean_gh += d * w[c] * h;
      dweight[c] += d * h;
      dbias[c] += d;
    }
    mean_g = RMS ? 0.f : mean_g / C;
    mean_gh /= C;
    for (c = 0; c < end; c += LANES) {
      const vfloat h = (LOAD(x + c) - mean) * scale;
      STORE(dx + c, (LOAD(dy + c) * LOAD(w + c) - mean_g - h * mean_gh) * scale);
    }
    for (; c < C; c++) {
      const float h = (GET(x + c) - mean) * scale;
      PUT(dx + c, (GET(dy + c) * w[c] - mean_g - h * mean_gh) * scale);
    }
  }
}
