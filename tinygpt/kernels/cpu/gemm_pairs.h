/* Packing for processors that multiply bfloat16 in pairs of depths, k and k + 1, side by side in 32
 * bits: what is float32 is rounded to bfloat16, and the depth is filled up to a multiple of 32. */

typedef float float16 __attribute__((ext_vector_type(16)));
typedef float float16_unaligned __attribute__((ext_vector_type(16), aligned(4)));
typedef int int16 __attribute__((ext_vector_type(16)));
typedef int int16_unaligned __attribute__((ext_vector_type(16), aligned(4)));
typedef unsigned uint16 __attribute__((ext_vector_type(16)));
typedef bf16 bf16x16 __attribute__((ext_vector_type(16), aligned(2)));

/* 16 numbers from p on, those from the n-th on zero */
#define LOAD16(p, n) \
  _Generic((p), float*: load16_f32, const float*: load16_f32, default: load16_bf16)(p, n)
HOT float16 load16_f32(const float* p, long n) {
  if (n >= 16) return (float16)*(const float16_unaligned*)p;
  float some[16];
  for (int i = 0; i < 16; i++) some[i] = i < n ? p[i] : 0.f;
  return (float16)*(const float16_unaligned*)some;
}
HOT float16 load16_bf16(const bf16* p, long n) {
  bf16 some[16];
  for (int i = 0; i < 16 && n < 16; i++) some[i] = i < n ? p[i] : 0;
  return (float16)(__builtin_convertvector(*(const bf16x16*)(n < 16 ? some : p), uint16) << 16);
}

/* bfloat16 in the upper halves */
HOT int16 rounded(float16 x) {
  const uint16 bits = (uint16)x;
  return (int16)(bits + 0x7fff + ((bits >> 16) & 1));
}
HOT int16 pairs(float16 low, float16 high) {
  return (int16)((uint16)rounded(low) >> 16) | (rounded(high) & (int)0xffff0000);
}

HOT int16 row_of_pairs(float16 first, float16 last) {
  bf16 row[32];
  *(bf16x16*)row = __builtin_convertvector((uint16)rounded(first) >> 16, bf16x16);
  *(bf16x16*)(row + 16) = __builtin_convertvector((uint16)rounded(last) >> 16, bf16x16);
  return (int16)*(const int16_unaligned*)row;
}

/* 16 x 16, transposed: swaps halves of halves of ... */
#define SWAP(distance, i, low, high) { \
    const int16 x = r[i], y = r[i + distance]; \
    r[i] = __builtin_shufflevector(x, y, low); \
    r[i + distance] = __builtin_shufflevector(x, y, high); \
  }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
HOT void transpose16(int16* r) {
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 8)) SWAP(8, i, LOW8, HIGH8)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 4)) SWAP(4, i, LOW4, HIGH4)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 2)) SWAP(2, i, LOW2, HIGH2)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 1)) SWAP(1, i, LOW1, HIGH1)
}

/* packed_b[panel][k / 2][GN][2] */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  const long depth = ROUND_UP(g->kc, 32);
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++)
    for (long half = 0; half < GN; half += 16) {
      const long j0 = g->jc + p * GN + half, n = g->jc + g->nc - j0;
      bf16* dst = (bf16*)g->packed_b + p * GN * depth + 2 * half;
      for (long k = 0; k < depth; k += 32) {
        int16 r[16];
        for (long j = 0; g->tb && j < 16; j++) {
          const b_t* src = g->b + (j0 + j) * g->K + g->pc + k;
          const long left = j < n ? g->kc - k : 0;
          r[j] = row_of_pairs(LOAD16(src, left), LOAD16(src + 16, left - 16));
        }
        if (g->tb) transpose16(r);
        for (long i = 0; !g->tb && i < 16; i++) {
          const long at = k + 2 * i;
          const b_t* src = g->b + (g->pc + at) * g->N + j0;
          r[i] = pairs(LOAD16(src, at < g->kc ? n : 0), LOAD16(src + g->N, at + 1 < g->kc ? n : 0));
        }
        for (long i = 0; i < 16; i++) *(int16_unaligned*)(dst + (k / 2 + i) * 2 * GN) = r[i];
      }
    }
}
