/* One Lion step (arXiv:2302.06675) on a weight of n elements and its momentum, in
 * place. */
#include "pool.h"
#include "vector.h"

typedef struct { float OPTIONS; } lion_options_t; /* options.py has the names */

typedef struct {
  float *p, *m;
  const float* grad;
  const lion_options_t* options;
  long n, tasks;
} lion_t;

static void some_elements(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  lion_t g = {.p = p, .m = m, .grad = grad, .n = n,
              .options = (const lion_options_t*)options};
  if (g.options->apply == 0.f) return;
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, n / 16384));
  parallel_for(shared->pool, some_elements, &g, g.tasks);
}

KERNEL static void some_elements(void* args, int index) {
  const lion_t* g = args;
  const lion_options_t* o = g->options;
  const float lr = o->learning_rate, beta1 = o->beta1, beta2 = o->beta2;
  const float decay = o->weight_decay, scale = o->grad_scale;
  for (long i = g->n * index / g->tasks; i < g->n * (index + 1) / g->tasks; i++) {
    const float x = g->grad[i] * scale, m = g->m[i], c = beta1 * m + (1.f - beta1) * x;
    g->p[i] = g->p[i] * (1.f - lr * decay) - lr * ((c > 0.f) - (c < 0.f));
    g->m[i] = beta2 * m + (1.f - beta2) * x;
  }
}
