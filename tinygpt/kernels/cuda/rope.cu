/* RoPE on the pairs (i, i + D/2) of x (B, H, T, D), whose batches, heads and rows are so many
 * elements apart in memory, in out too; BACKWARD turns the other way. cos and sin are (T, D/2). */
#include "common.h"

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long index = (long)blockIdx.x * THREADS + threadIdx.x, half = D / 2;
  if (index >= B * H * T * half) return;
  const long i = index % half, rest = index / half;
  /* neighbouring threads have neighbours in memory */
  const long t = row > head ? rest / H % T : rest % T, h = row > head ? rest % H : rest / T % H;
  const long at = rest / (H * T) * batch + h * head + t * row + i;
  const float a = to_float(x[at]), b = to_float(x[at + half]), c = cos[t * half + i];
  const float s = BACKWARD ? -sin[t * half + i] : sin[t * half + i];
  from_float(a * c - b * s, &out[at]);
  from_float(b * c + a * s, &out[at + half]);
}
