/* out (PARTS): the sums of a part of the squares of all elements of COUNT arrays x with n elements
 * each; a block for each part. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  __shared__ float parts[32];
  float sum = 0.f, z[4];
  for (int a = 0; a < COUNT; a++) {
    const float* in = x[a];
    const long stride = (long)PARTS * THREADS, first = (long)blockIdx.x * THREADS + threadIdx.x;
    for (long i = first; i < n[a] / 4; i += stride) {
      load<4>(in + i * 4, z);
      for (int e = 0; e < 4; e++) sum += z[e] * z[e];
    }
    for (long i = n[a] / 4 * 4 + first; i < n[a]; i += stride) sum += in[i] * in[i];
  }
  sum = block_sum(sum, parts);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
