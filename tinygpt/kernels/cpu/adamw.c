/* One AdamW step on a weight of n elements, in place. */
#include "pool.h"
#include "vector.h"
#include "adamw.h"

typedef struct {
  float *p, *m, *v;
  const float* grad;
  const adamw_options_t* options;
  long n, tasks;
} adamw_t;

static void some_elements(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  adamw_t g = {.p = p, .m = m, .v = v, .grad = grad, .n = n,
               .options = (const adamw_options_t*)options};
  if (g.options->apply == 0.f) return;
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, n / 16384));
  parallel_for(shared->pool, some_elements, &g, g.tasks);
}

KERNEL static void some_elements(void* args, int index) {
  const adamw_t* g = args;
  const long i = g->n * index / g->tasks, end = g->n * (index + 1) / g->tasks;
  adamw_step(g->p + i, g->m + i, g->v + i, g->grad + i, g->options, end - i);
}
