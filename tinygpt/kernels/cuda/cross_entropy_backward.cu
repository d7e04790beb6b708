/* dx (N, W) of cross_entropy_forward, from dloss (N); zeros beyond the vocabulary. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long row = (long)blockIdx.x * W;
  const int target = y[blockIdx.x];
  const float lz = log_z[blockIdx.x], scale = target < 0 ? 0.f : dloss[blockIdx.x];
  float z[VECTOR];
  for (long i = threadIdx.x * VECTOR; i < W; i += THREADS * VECTOR) {
    load<VECTOR>(x + row + i, z);
    for (int e = 0; e < VECTOR; e++) {
      const float p = expf(z[e] - lz) * (1.f + 2.f * z_loss * lz);
      const float wanted = (i + e == target ? 1.f - label_smoothing : 0.f) + label_smoothing / V;
      z[e] = i + e < V ? (p - wanted) * scale : 0.f;
    }
    store<VECTOR>(dx + row + i, z);
  }
}
