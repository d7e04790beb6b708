/* loss (N) of each row of logits x (N, W), of which the first V are a vocabulary's, with targets y
 * (N); 0 where the target is negative. log_z (N) is log(sum(exp(x))). A block for each row. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  __shared__ float parts[32];
  const x_t* in = x + (long)blockIdx.x * W;
  float top = -INFINITY, total = 0.f, sum = 0.f, z[VECTOR];
  for (long i = threadIdx.x * VECTOR; i < V; i += THREADS * VECTOR) {
    load<VECTOR>(in + i, z);
    float peak = top;
    for (int e = 0; e < VECTOR; e++) peak = fmaxf(peak, z[e]);
    if (peak > top) total *= expf(top - peak);
    top = peak;
    for (int e = 0; e < VECTOR; e++) {
      total += expf(z[e] - top);
      sum += z[e];
    }
  }
  const float peak = block_max(top, parts);
  total = block_sum(top > -INFINITY ? total * expf(top - peak) : 0.f, parts);
  if (label_smoothing > 0.f) sum = block_sum(sum, parts);
  if (threadIdx.x == 0) {
    const int target = y[blockIdx.x];
    const float lz = logf(total) + peak;
    const float wanted = target < 0 ? 0.f : to_float(in[target]);
    log_z[blockIdx.x] = lz;
    loss[blockIdx.x] = target < 0 ? 0.f : lz - (1.f - label_smoothing) * wanted
        - (label_smoothing > 0.f ? label_smoothing * sum / V : 0.f) + z_loss * lz * lz;
  }
}
