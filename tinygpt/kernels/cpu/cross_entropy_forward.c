/* For each row of logits x (N x V) with target y: log Z and the loss
 *   log Z - (1 - s) x[y] - s mean(x) + z (log Z)^2,   s label smoothing, z z-loss,
 * or 0 where y < 0; a y above V - 1 has no x[y]. Nothing of size V is kept. */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const act* x;
  const int* y;
  float *loss, *log_z;
  float label_smoothing, z_loss;
  long N, V, tasks;
} entropy_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  entropy_t g = {.x = x, .y = y, .loss = loss, .log_z = log_z, .label_smoothing = label_smoothing,
                 .z_loss = z_loss, .N = N, .V = V};
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, N / 4));
  parallel_for(shared->pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const entropy_t* g = args;
  const long V = g->V, end = V / (4 * LANES) * (4 * LANES);
  const float smoothing = g->label_smoothing, z_loss = g->z_loss;
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const act* x = g->x + i * V;
    vfloat top[4], sum[4], total = (vfloat)0.f;
    UNROLL for (int u = 0; u < 4; u++) top[u] = (vfloat)(-__builtin_inff());
    long j;
    for (j = 0; j < end; j += 4 * LANES)
      UNROLL for (int u = 0; u < 4; u++) top[u] = vmax(top[u], LOAD(x + j + u * LANES));
    float m = vmaximum(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    for (; j < V; j++) m = MAX(m, GET(x + j));

    UNROLL for (int u = 0; u < 4; u++) sum[u] = (vfloat)0.f;
    for (j = 0; j < end; j += 4 * LANES)
      UNROLL for (int u = 0; u < 4; u++) sum[u] += vexp(LOAD(x + j + u * LANES) - m);
    float s = vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; j < V; j++) s += sexp(GET(x + j) - m);

    float mean = 0.f;
    if (smoothing != 0.f) {
      for (j = 0; j < end; j += LANES) total += LOAD(x + j);
      mean = vsum(total);
      for (; j < V; j++) mean += GET(x + j);
      mean /= V;
    }
    const float lse = m + slog2(s) * LN2;
    const int y = g->y[i];
    const float target = y >= 0 && y < V ? GET(x + y) : 0.f;
    g->log_z[i] = lse;
    g->loss[i] = y < 0 ? 0.f
               : lse - (1.f - smoothing) * target - smoothing * mean + z_loss * lse * lse;
  }
}
