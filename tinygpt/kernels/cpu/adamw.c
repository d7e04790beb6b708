/* One AdamW step (arXiv:1711.05101) on a weight of n elements, in place. options: learning rate,
 * beta1, beta2, epsilon, weight decay, 1 / (1 - beta1^t), 1 / (1 - beta2^t), scale of the
 * gradient, and 0 where nothing may change. */
#include "pool.h"
#include "vector.h"

typedef struct {
  float *p, *m, *v;
  const float *grad, *options;
  long n, tasks;
} adamw_t;

static void some_elements(void* args, int index);

KERNEL void NAME(float* p, float* m, float* v, const float* grad, const float* options,
                 const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  adamw_t g = {.p = p, .m = m, .v = v, .grad = grad, .options = options, .n = dims[0]};
  if (options[8] == 0.f) return;
  g.tasks = MAX(1, MIN(4 * (long)pool->threads, g.n / 16384));
  parallel_for(pool, some_elements, &g, g.tasks);
}

KERNEL static void some_elements(void* args, int index) {
  const adamw_t* g = args;
  const float *o = g->options, lr = o[0], beta1 = o[1], beta2 = o[2], eps = o[3], decay = o[4];
  const float debias1 = o[5], debias2 = o[6], scale = o[7];
  for (long i = g->n * index / g->tasks; i < g->n * (index + 1) / g->tasks; i++) {
    const float x = g->grad[i] * scale;
    const float m = g->m[i] = beta1 * g->m[i] + (1.f - beta1) * x;
    const float v = g->v[i] = beta2 * g->v[i] + (1.f - beta2) * x * x;
    g->p[i] = g->p[i] * (1.f - lr * decay)
            - lr * (m * debias1) / (__builtin_sqrtf(v * debias2) + eps);
  }
}
