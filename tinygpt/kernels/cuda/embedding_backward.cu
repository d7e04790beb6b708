/* dweight (V, C), where row v is the sum of the rows of dy (N, C) whose id in idx (N) is v, always
 * in the same order. A block for each row of dweight looks for them among all ids. */
#include "common.h"

#define COLUMNS ((C + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  __shared__ unsigned found[THREADS / 32];
  const int v = blockIdx.x;
  float sums[COLUMNS] = {};
  for (long first = 0; first < N; first += THREADS) {
    const long i = first + threadIdx.x;
    const bool here = i < N && idx[i] == v;
    if (!__syncthreads_or(here)) continue;
    const unsigned mask = __ballot_sync(0xffffffffu, here);
    if (LANE == 0) found[WARP_OF_BLOCK] = mask;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++)
      for (unsigned rest = found[w]; rest; rest &= rest - 1) {
        const dy_t* row = dy + (first + w * 32 + __ffs(rest) - 1) * C;
#pragma unroll
        for (int k = 0; k < COLUMNS; k++)
          if (k * THREADS + threadIdx.x < C) sums[k] += to_float(row[k * THREADS + threadIdx.x]);
      }
  }
#pragma unroll
  for (int k = 0; k < COLUMNS; k++)
    if (k * THREADS + threadIdx.x < C) dweight[v * C + k * THREADS + threadIdx.x] = sums[k];
}
