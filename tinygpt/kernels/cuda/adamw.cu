/* AdamW (arXiv:1711.05101) on n elements of a weight, in place; options.py has the options. */
#include "common.h"

struct adamw_options { float OPTIONS; };

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const adamw_options o = *(const adamw_options*)options;
  const long i = ((long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
  if (i >= n || o.apply == 0.f) return;
  float w[VECTOR], first[VECTOR], second[VECTOR], g[VECTOR];
  load<VECTOR>(p + i, w);
  load<VECTOR>(m + i, first);
  load<VECTOR>(v + i, second);
  load<VECTOR>(grad + i, g);
  for (int e = 0; e < VECTOR; e++) {
    const float x = g[e] * o.grad_scale;
    first[e] = o.beta1 * first[e] + (1.f - o.beta1) * x;
    second[e] = o.beta2 * second[e] + (1.f - o.beta2) * x * x;
    w[e] = w[e] * (1.f - o.learning_rate * o.weight_decay) - o.learning_rate
        * (first[e] * o.bias_correction1) / (sqrtf(second[e] * o.bias_correction2) + o.eps);
  }
  store<VECTOR>(p + i, w);
  store<VECTOR>(m + i, first);
  store<VECTOR>(v + i, second);
}
