/* One Lion step (arXiv:2302.06675) on a weight of n elements and its momentum, in place. options:
 * learning rate, beta1, beta2, weight decay, scale of the gradient, and 0 where nothing may
 * change. */
#include "pool.h"
#include "vector.h"

typedef struct {
  float *p, *m;
  const float *grad, *options;
  long n, tasks;
} lion_t;

static void some_elements(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  lion_t g = {.p = p, .m = m, .grad = grad, .options = options, .n = n};
  if (options[5] == 0.f) return;
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, n / 16384));
  parallel_for(shared->pool, some_elements, &g, g.tasks);
}

KERNEL static void some_elements(void* args, int index) {
  const lion_t* g = args;
  const float *o = g->options, lr = o[0], beta1 = o[1], beta2 = o[2], decay = o[3], scale = o[4];
  for (long i = g->n * index / g->tasks; i < g->n * (index + 1) / g->tasks; i++) {
    const float x = g->grad[i] * scale, m = g->m[i], c = beta1 * m + (1.f - beta1) * x;
    g->p[i] = g->p[i] * (1.f - lr * decay) - lr * ((c > 0.f) - (c < 0.f));
    g->m[i] = beta2 * m + (1.f - beta2) * x;
  }
}
