/* The micro kernel of gemm.h on Intel AMX: what is float32 is rounded to bfloat16 as it is packed,
 * and sums are float32. Blocks of C are 2 x 2 tiles. */
#include "amx.h"

#define ROW_BYTES (KC * 2 + 64)         /* of packed A; + 64: rows must not share a cache set */

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
          bf16 row[32];
          UNROLL for (int h = 0; h < 32; h += 16) {
            const float16 x = LOAD16(src + h, left - h);
            *(bf16x16*)(row + h) = __builtin_convertvector((uint16)rounded(x) >> 16, bf16x16);
          }
          r[j] = (int16)*(const int16_unaligned*)row;
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

/* packed_a[row][k], bfloat16, from row i0 of C on; with ta also the sums of the columns of A */
HOT void pack_a(const gemm_t* g, long i0, long rows, unsigned char* packed_a) {
  const long depth = ROUND_UP(g->kc, 32);
  for (long i = 0; i < ROUND_UP(rows, GM); i += 16) {
    const long n = rows - i;
    float16 sum = (float16)0.f;
    for (long k = 0; g->ta && k < depth; k += 32) {
      int16 r[16];
      for (long x = 0; x < 16; x++) {
        const long at = k + 2 * x;
        const a_t* src = g->a + (g->pc + at) * g->M + i0 + i;
        const float16 low = LOAD16(src, at < g->kc ? n : 0);
        const float16 high = LOAD16(src + g->M, at + 1 < g->kc ? n : 0);
        sum += low + high;
        r[x] = pairs(low, high);
      }
      transpose16(r);
      for (long x = 0; x < 16; x++)
        *(int16_unaligned*)(packed_a + (i + x) * ROW_BYTES + 2 * k) = r[x];
    }
    if (g->sums && !g->jc)
      for (long x = 0; x < MIN(16, n); x++)
        g->sums[i0 + i + x] = sum[x] + (g->pc ? g->sums[i0 + i + x] : 0.f);
    for (long x = 0; !g->ta && x < 16; x++)
      for (long k = 0; k < depth; k += 16) {
        const a_t* src = g->a + (i0 + i + x) * g->K + g->pc + k;
        const float16 some = LOAD16(src, x < n ? g->kc - k : 0);
        *(bf16x16*)(packed_a + (i + x) * ROW_BYTES + 2 * k) =
            __builtin_convertvector((uint16)rounded(some) >> 16, bf16x16);
      }
  }
}

KERNEL static void multiply(void* args, int index) {
  const gemm_t* g = args;
  const long first = index * g->rows, rows = MIN(first + g->rows, g->M) - first;
  const long depth = ROUND_UP(g->kc, 32);
  unsigned char packed_a[MC * ROW_BYTES] __attribute__((aligned(64)));
  float block[GM * GN] __attribute__((aligned(64)));
  pack_a(g, first, rows, packed_a);
  TILES_BEGIN
  for (long j = 0; j < g->nc; j += GN)
    for (long i = 0; i < rows; i += GM) {
      const unsigned char* a = packed_a + i * ROW_BYTES;
      const bf16* b = (const bf16*)g->packed_b + j * depth;
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
      for (long k = 0; k < depth; k += 32) {
        TILE_LOAD(4, a + 2 * k, ROW_BYTES);
        TILE_LOAD(5, a + 2 * k + 16 * ROW_BYTES, ROW_BYTES);
        TILE_LOAD(6, b + k * GN, 4 * GN);
        TILE_LOAD(7, b + k * GN + 32, 4 * GN);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
      TILE_STORE(0, block, 4 * GN);
      TILE_STORE(1, block + 16, 4 * GN);
      TILE_STORE(2, block + 16 * GN, 4 * GN);
      TILE_STORE(3, block + 16 * GN + 16, 4 * GN);
      store_block(g, first + i, j, block, GN, MIN(rows - i, GM), MIN(g->nc - j, GN));
    }
  TILES_END
}
