/* dx = dloss * (softmax(x) (1 + 2 z log Z) - s / V - (1 - s) [j = y]), 0 where y < 0.
 * options: s, z. */
#include "pool.h"
#include "vector.h"

typedef struct {
  const float *dloss, *log_z, *options;
  const act* x;
  const int* y;
  act* dx;
  long N, V, tasks;
} entropy_t;

static void some_rows(void* args, int index);

KERNEL void NAME(act* dx, const float* dloss, const act* x, const int* y, const float* log_z,
                 const float* options, const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  entropy_t g = {.dloss = dloss, .x = x, .log_z = log_z, .options = options, .y = y, .dx = dx,
                 .N = dims[0], .V = dims[1]};
  g.tasks = MAX(1, MIN(4 * (long)pool->threads, g.N / 4));
  parallel_for(pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const entropy_t* g = args;
  const long V = g->V, end = VECTOR_END(V);
  const float smoothing = g->options[0], z_loss = g->options[1];
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
