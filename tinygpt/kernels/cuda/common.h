/* Numbers of 16 bits, vectors of 16 bytes, sums over a warp and a block. Needs an NVIDIA GPU of
 * compute capability 8.0 or later. tests/kernels/cuda_emulator.h has what is not CUDA C++ here for
 * a CPU. */
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
struct alignas(16) vector16 { unsigned words[4]; };

#define DEVICE static __device__ __forceinline__
#define LANE (threadIdx.x % 32)
#define WARP_OF_BLOCK (threadIdx.x / 32)

#ifndef EMULATED
#define INFINITY __int_as_float(0x7f800000)
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE void from_float(float x, bf16* y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
DEVICE void from_float(float x, f16* y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
#endif
DEVICE float to_float(float x) { return x; }
DEVICE void from_float(float x, float* y) { *y = x; }

/* `count` elements at p, which is aligned to all of them */
template <int count, typename T> DEVICE void load(const T* p, float* x) {
  if (count == 1) {
    x[0] = to_float(p[0]);
    return;
  }
  union { vector16 all; T each[count]; } u;
  u.all = *(const vector16*)p;
#pragma unroll
  for (int i = 0; i < count; i++) x[i] = to_float(u.each[i]);
}

template <int count, typename T> DEVICE void store(T* p, const float* x) {
  if (count == 1) {
    from_float(x[0], p);
    return;
  }
  union { vector16 all; T each[count]; } u;
#pragma unroll
  for (int i = 0; i < count; i++) from_float(x[i], &u.each[i]);
  *(vector16*)p = u.all;
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}

/* for all threads of a block; `parts` is shared memory for a number of each warp */
DEVICE float block_sum(float x, float* parts) {
  x = warp_sum(x);
  __syncthreads();
  if (LANE == 0) parts[WARP_OF_BLOCK] = x;
  __syncthreads();
  return warp_sum(LANE < THREADS / 32 ? parts[LANE] : 0.f);
}

DEVICE float block_max(float x, float* parts) {
  x = warp_max(x);
  __syncthreads();
  if (LANE == 0) parts[WARP_OF_BLOCK] = x;
  __syncthreads();
  return warp_max(LANE < THREADS / 32 ? parts[LANE] : -INFINITY);
}
