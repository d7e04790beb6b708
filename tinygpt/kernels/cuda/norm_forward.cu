/* y = (x - mean) / deviation * weight + bias of each row of x (N, C), a warp each. stats (N, 2)
 * are mean and 1 / deviation. RMS: the mean is not subtracted. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long row = blockIdx.x * (THREADS / 32) + WARP_OF_BLOCK;
  if (row >= N) return;
  const x_t* in = x + row * C;
  float z[VECTOR], w[VECTOR], b[VECTOR], mean = 0.f, square = 0.f;
  if (!RMS) {
    for (long i = LANE * VECTOR; i < C; i += 32 * VECTOR) {
      load<VECTOR>(in + i, z);
      for (int e = 0; e < VECTOR; e++) mean += z[e];
    }
    mean = warp_sum(mean) / C;
  }
  for (long i = LANE * VECTOR; i < C; i += 32 * VECTOR) {
    load<VECTOR>(in + i, z);
    for (int e = 0; e < VECTOR; e++) square += (z[e] - mean) * (z[e] - mean);
  }
  const float scale = rsqrtf(warp_sum(square) / C + eps);
  for (long i = LANE * VECTOR; i < C; i += 32 * VECTOR) {
    load<VECTOR>(in + i, z);
    for (int e = 0; e < VECTOR; e++) {
      w[e] = weight[i + e];
      b[e] = bias ? bias[i + e] : 0.f;
      z[e] = (z[e] - mean) * scale * w[e] + b[e];
    }
    store<VECTOR>(y + row * C + i, z);
  }
  if (LANE == 0) {
    stats[row * 2] = mean;
    stats[row * 2 + 1] = scale;
  }
}
