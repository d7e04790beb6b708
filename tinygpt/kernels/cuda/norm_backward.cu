/* dx of norm_forward, a warp for each row; stats (N, 2) are mean and 1 / deviation. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long row = blockIdx.x * (THREADS / 32) + WARP_OF_BLOCK;
  if (row >= N) return;
  const float mean = stats[row * 2], scale = stats[row * 2 + 1];
  float z[VECTOR], g[VECTOR], sum = 0.f, product = 0.f;
  for (long i = LANE * VECTOR; i < C; i += 32 * VECTOR) {
    load<VECTOR>(x + row * C + i, z);
    load<VECTOR>(dy + row * C + i, g);
    for (int e = 0; e < VECTOR; e++) {
      const float d = g[e] * weight[i + e];
      sum += d;
      product += d * (z[e] - mean) * scale;
    }
  }
  sum = RMS ? 0.f : warp_sum(sum) / C;
  product = warp_sum(product) / C;
  for (long i = LANE * VECTOR; i < C; i += 32 * VECTOR) {
    load<VECTOR>(x + row * C + i, z);
    load<VECTOR>(dy + row * C + i, g);
    for (int e = 0; e < VECTOR; e++)
      z[e] = scale * (g[e] * weight[i + e] - sum - (z[e] - mean) * scale * product);
    store<VECTOR>(dx + row * C + i, z);
  }
}
