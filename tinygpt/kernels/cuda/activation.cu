/* out = f(x) of n elements, or with BACKWARD its gradient dy f'(x). GELU: exact. GELU_TANH: its
 * approximation. SWIGLU: silu(x) * up, out_up is the gradient of up. */
#include "common.h"

/* f(x), and its derivative in *d */
DEVICE float activate(float x, float* d) {
#ifdef GELU
  const float cdf = .5f * (1.f + erff(x * .70710678f));
  *d = cdf + x * .39894228f * expf(-.5f * x * x);
  return x * cdf;
#elif defined(GELU_TANH)
  const float u = .79788456f * (x + .044715f * x * x * x), t = tanhf(u);
  *d = .5f * (1.f + t) + .5f * x * (1.f - t * t) * .79788456f * (1.f + 3.f * .044715f * x * x);
  return .5f * x * (1.f + t);
#else
  const float s = 1.f / (1.f + expf(-x));
  *d = s * (1.f + x * (1.f - s));
  return x * s;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long i = ((long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
  if (i >= n) return;
  float z[VECTOR], g[VECTOR], u[VECTOR], d;
  load<VECTOR>(x + i, z);
  if (BACKWARD) load<VECTOR>(dy + i, g);
  if (up) load<VECTOR>(up + i, u);
  for (int e = 0; e < VECTOR; e++) {
    const float y = activate(z[e], &d);
    const float factor = up ? u[e] : 1.f;
    z[e] = BACKWARD ? g[e] * d * factor : y * factor;
    if (BACKWARD) u[e] = g[e] * y;
  }
  store<VECTOR>(out + i, z);
  if (out_up) store<VECTOR>(out_up + i, u);
}
