/* dx = dloss * (softmax(x) (1 + 2 z log Z) - s / V - (1 - s) [j = y]), 0 where y < 0,
 * s label smoothing, z z-loss */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const float *dloss, *log_z;
  const act* x;
  const int* y;
  act* dx;
  float label_smoothing, z_loss;
  long N, V, tasks;
} entropy_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  entropy_t g = {.dloss = dloss, .x = x, .log_z = log_z, .y = y, .dx = dx,
                 .label_smoothing = label_smoothing, .z_loss = z_loss, .N = N, .V = V};
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, N / 4));
  parallel_for(shared->pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const entropy_t* g = args;
  const long V = g->V, end = VECTOR_END(V);
  const float smoothing = g->label_smoothing, z_loss = g->z_loss;
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const act* x = g->x + i * V;
    act* dx = g->dx + i * V;
    const float log_z = g->log_z[i];
    const int y = g->y[i], counts = y >= 0;
    const float d = counts ? g->dloss[i] : 0.f;
    const float scale = d * (1.f + 2.f * z_loss * log_z), shift = d * smoothing / V;
    long j;
    for (j = 0; j < end; j += LANES) STORE(dx + j, vexp(LOAD(x + j) - log_z) * scale - shift);
    for (; j < V; j++) PUT(dx + j, sexp(GET(x + j) - log_z) * scale - shift);
    if (counts && y < V)
      PUT(dx + y, sexp(GET(x + y) - log_z) * scale - shift - d * (1.f - smoothing));
  }
}
