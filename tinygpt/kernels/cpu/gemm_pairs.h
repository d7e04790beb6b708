/* Packing for processors that multiply bfloat16 in pairs of depths, k and k + 1, side by side in 32
 * bits: what is float32 is rounded to bfloat16, and the depth is filled up to a multiple of 32. */

typedef unsigned uint16 __attribute__((ext_vector_type(16)));
typedef unsigned short short16 __attribute__((ext_vector_type(16), aligned(2)));
typedef unsigned short short32 __attribute__((ext_vector_type(32), aligned(2)));

/* 16 numbers from p on, those from the n-th on zero */
HOT float16 load16_f32(const float* p, long n) {
  if (n >= 16) return (float16)*(const float16_unaligned*)p;
  float some[16];
  for (int i = 0; i < 16; i++) some[i] = i < n ? p[i] : 0.f;
  return (float16)*(const float16_unaligned*)some;
}
HOT short16 load16_bf16(const bf16* p, long n) {
  if (n >= 16) return *(const short16*)p;
  bf16 some[16];
  for (int i = 0; i < 16; i++) some[i] = i < n ? p[i] : 0;
  return *(const short16*)some;
}
/* bfloat16 of 32 floats */
HOT short32 rounded(float16 first, float16 last) {
#if defined(__AVX512BF16__)
  typedef float vsums __attribute__((vector_size(64)));
  return (short32)__builtin_ia32_cvtne2ps2bf16_512((vsums)last, (vsums)first);
#else
  short32 row;
  const uint16 low = (uint16)first, high = (uint16)last;
  row.lo = __builtin_convertvector((low + 0x7fff + ((low >> 16) & 1)) >> 16, short16);
  row.hi = __builtin_convertvector((high + 0x7fff + ((high >> 16) & 1)) >> 16, short16);
  return row;
#endif
}

/* 32 numbers from p on in 16 pairs, those from the n-th on zero */
#define ROW_OF_PAIRS(p, n) \
  _Generic((p), float*: row_of_f32, const float*: row_of_f32, default: row_of_bf16)(p, n)
HOT int16 row_of_f32(const float* p, long n) {
  return (int16)rounded(load16_f32(p, n), load16_f32(p + 16, n - 16));
}
HOT int16 row_of_bf16(const bf16* p, long n) {
  if (n >= 32) return (int16)*(const short32*)p;
  short32 row;
  row.lo = load16_bf16(p, n);
  row.hi = load16_bf16(p + 16, n - 16);
  return (int16)row;
}

/* the pairs of 16 numbers from `low` on, m of them, and of 16 from `high` on, n of them */
#define PAIRS(low, high, m, n) \
  _Generic((low), float*: pairs_f32, const float*: pairs_f32, default: pairs_bf16)(low, high, m, n)
HOT int16 pairs_f32(const float* low, const float* high, long m, long n) {
  const short32 row = rounded(load16_f32(low, m), load16_f32(high, n));
  return (int16)__builtin_shufflevector(row, row, INTERLEAVED);
}
HOT int16 pairs_bf16(const bf16* low, const bf16* high, long m, long n) {
  return (int16)__builtin_shufflevector(load16_bf16(low, m), load16_bf16(high, n), INTERLEAVED);
}

/* the two numbers of each pair, added */
HOT float16 sums_of_pairs(int16 r) { return (float16)(r << 16) + (float16)(r & (int)0xffff0000); }

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
          __builtin_prefetch(src + 16 * g->K);
          __builtin_prefetch(src + 16 * g->K + 16);
          r[j] = ROW_OF_PAIRS(src, left);
        }
        if (g->tb) transpose16(r);
        for (long i = 0; !g->tb && i < 16; i++) {
          const long at = k + 2 * i;
          const b_t* src = g->b + (g->pc + at) * g->N + j0;
          __builtin_prefetch(src + 32 * g->N);
          __builtin_prefetch(src + 33 * g->N);
          r[i] = PAIRS(src, src + g->N, at < g->kc ? n : 0, at + 1 < g->kc ? n : 0);
        }
        for (long i = 0; i < 16; i++) *(int16_unaligned*)(dst + (k / 2 + i) * 2 * GN) = r[i];
      }
    }
}
