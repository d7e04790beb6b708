/* One activation, forward or backward, over n elements, the one that is defined of
 *   GELU (arXiv:1606.08415), GELU_TANH, its approximation, SWIGLU (arXiv:2002.05202) of two inputs
 * With BACKWARD 1 dy is the gradient of the output, and out and out_up are those of x and up. */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const act *dy, *x, *up;
  act *out, *out_up;
  long n, tasks;
} activation_t;

static void some_elements(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  activation_t g = {.dy = dy, .x = x, .up = up, .out = out, .out_up = out_up, .n = n};
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, n / 4096));
  parallel_for(shared->pool, some_elements, &g, g.tasks);
}

/* erf(z), z >= 0, given exp(-z^2), to 1.5e-7 (Abramowitz and Stegun 7.1.26) */
HOT vfloat verf(vfloat z, vfloat e) {
  const vfloat t = 1.0f / (1.0f + 0.3275911f * z);
  vfloat p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return 1.0f - t * p * e;
}

HOT vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + vexp(-x)); }

/* y, or with the gradient dy of y: dx, and for SWIGLU dup */
HOT vfloat apply(vfloat dy, vfloat x, vfloat up, vfloat* dup) {
#if GELU
  const vfloat e = vexp2(x * x * (-0.5f * LOG2E));
  const vfloat half = 0.5f * verf(vabs(x) * 0.70710678f, e);
  const vfloat cdf = 0.5f + select(x < 0.f, -half, half);
  return BACKWARD ? dy * (cdf + x * e * 0.39894228f) : x * cdf;
#elif GELU_TANH
  const vfloat x2 = x * x;
  const vfloat s = sigmoid(1.5957691f * x * (1.0f + 0.044715f * x2)); /* (1 + tanh(z)) / 2 */
  const vfloat slope = 1.5957691f * (1.0f + 0.134145f * x2);
  return BACKWARD ? dy * (s + x * s * (1.0f - s) * slope) : x * s;
#else
  const vfloat s = sigmoid(x);
  *dup = dy * x * s;
  return BACKWARD ? dy * up * s * (1.0f + x * (1.0f - s)) : x * s * up;
#endif
}

KERNEL static void some_elements(void* args, int index) {
  const activation_t* g = args;
  const vfloat zero = (vfloat)0.f;
  const long first = g->n * index / g->tasks, last = g->n * (index + 1) / g->tasks;
  for (long i = first; i < last; i += LANES) {
    vfloat dup = zero;
    if (i + LANES <= last) {
      STORE(g->out + i, apply(g->dy ? LOAD(g->dy + i) : zero, LOAD(g->x + i),
                              g->up ? LOAD(g->up + i) : zero, &dup));
      if (g->out_up) STORE(g->out_up + i, dup);
      continue;
    }
    for (long j = i; j < last; j++) {
      PUT(g->out + j, apply((vfloat)(g->dy ? GET(g->dy + j) : 0.f), (vfloat)GET(g->x + j),
                            (vfloat)(g->up ? GET(g->up + j) : 0.f), &dup)[0]);
      if (g->out_up) PUT(g->out_up + j, dup[0]);
    }
  }
}
