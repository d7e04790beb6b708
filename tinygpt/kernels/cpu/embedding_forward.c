/* out (N x C) = rows of weight (V x C), each times its scale where there is one, at idx (N) */
#include "pool.h"
#include "vector.h"
#include "weight.h"

typedef struct {
  const int* idx;
  const weight_t* weight;
  const float* scale;
  float* out;
  long N, C, tasks;
} embedding_t;

static void some_rows(void* args, int index);

KERNEL void NAME(ARGUMENTS const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  embedding_t g = {.idx = idx, .weight = (const weight_t*)weight, .scale = SCALE, .out = out,
                   .N = dims[0], .C = dims[1]};
  g.tasks = MAX(1, MIN(4 * (long)pool->threads, g.N / 64));
  parallel_for(pool, some_rows, &g, g.tasks);
}

KERNEL static void some_rows(void* args, int index) {
  const embedding_t* g = args;
  for (long i = g->N * index / g->tasks; i < g->N * (index + 1) / g->tasks; i++) {
    const weight_t* src = g->weight + g->idx[i] * g->C;
    const float scale = g->scale ? g->scale[g->idx[i]] : 1.f;
    for (long c = 0; c < g->C; c++) g->out[i * g->C + c] = to_float(src[c]) * scale;
  }
}
