/* sums (PARTS, C): the sums over a part's rows of dy (N, C); products (PARTS, C): the same of dy
 * times the normalized x, with stats (N, 2), mean and 1 / deviation. A block takes 32 columns and
 * a part of the rows, which its warps share. */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  __shared__ float parts[2][THREADS / 32][32];
  const long column = blockIdx.x * 32 + LANE, share = (N + PARTS - 1) / PARTS;
  const long end = min((blockIdx.y + 1) * share, N);
  float sum = 0.f, product = 0.f;
  if (column < C) {
#pragma unroll 4
    for (long row = blockIdx.y * share + WARP_OF_BLOCK; row < end; row += THREADS / 32) {
      const float g = to_float(dy[row * C + column]);
      sum += g;
      if (products)
        product += g * (to_float(x[row * C + column]) - stats[row * 2]) * stats[row * 2 + 1];
    }
  }
  parts[0][WARP_OF_BLOCK][LANE] = sum;
  parts[1][WARP_OF_BLOCK][LANE] = product;
  __syncthreads();
  if (WARP_OF_BLOCK == 0 && column < C) {
    sum = product = 0.f;
    for (int i = 0; i < THREADS / 32; i++) {
      sum += parts[0][i][LANE];
      product += parts[1][i][LANE];
    }
    if (sums) sums[blockIdx.y * C + column] = sum;
    if (products) products[blockIdx.y * C + column] = product;
  }
}
