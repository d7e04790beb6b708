/* out (N x C) = rows of weight (V x C) at idx (N), with their scale where there is one; zeros where
 * there is no such row */
#include "pool.h"
#include "vector.h"
#include "weight.h"

typedef struct {
  const int* idx;
  const weight_t* weight;
  const scale_t* scale;
  float* out;
  long N, C, V, tasks;
} embedding_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  embedding_t g = {.idx = idx, .weight = weight, .scale = scale, .out = out,
                   .N = N, .C = C, .V = V};
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, N / 64));
  parallel_for(shared->pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const embedding_t* g = args;
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const long row = g->idx[i], there = row >= 0 && row < g->V;
    float* out = g->out + i * g->C;
    if (there)
      load_weights(out, g->weight, g->scale, row, g->C, 0, g->C);
    else
      for (long c = 0; c < g->C; c++) out[c] = 0.f;
  }
}
