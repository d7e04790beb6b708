/* dweight (V x C) = sums of the rows of dy (N x C) by idx (N). Each task owns some of the columns,
 * so that nothing is shared and the order of the sums is always the same. */
#include "pool.h"
#include "vector.h"

typedef struct {
  const int* idx;
  const float* dy;
  float* dweight;
  long N, V, C, tasks;
} embedding_t;

static void some_columns(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  embedding_t g = {.idx = idx, .dy = dy, .dweight = dweight, .N = N, .V = V, .C = C};
  g.tasks = MAX(1, MIN((long)shared->pool->threads, C / 16));
  parallel_for(shared->pool, some_columns, &g, g.tasks);
}

KERNEL static void some_columns(void* args, int index) {
  const embedding_t* g = args;
  const long C = g->C, first = C * index / g->tasks, last = C * (index + 1) / g->tasks;
  for (long v = 0; v < g->V; v++)
    for (long c = first; c < last; c++) g->dweight[v * C + c] = 0.f;
  for (long i = 0; i < g->N; i++) {
    if (g->idx[i] < 0 || g->idx[i] >= g->V) continue;
    float* dst = g->dweight + g->idx[i] * C;
    const float* src = g->dy + i * C;
    for (long c = first; c < last; c++) dst[c] += src[c];
  }
}
