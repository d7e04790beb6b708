/* The micro kernel of gemm.h on Intel AMX: what is float32 is rounded to bfloat16 as it is packed,
 * and sums are float32. Blocks of C are 2 x 2 tiles. */
#include "amx.h"

#define ROW_BYTES (KC * 2 + 64)         /* of packed A; + 64: rows must not share a cache set */

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
        r[x] = PAIRS(src, src + g->M, at < g->kc ? n : 0, at + 1 < g->kc ? n : 0);
        sum += sums_of_pairs(r[x]);
      }
      transpose16(r);
      for (long x = 0; x < 16; x++)
        *(int16_unaligned*)(packed_a + (i + x) * ROW_BYTES + 2 * k) = r[x];
    }
    if (g->sums && !g->jc)
      for (long x = 0; x < MIN(16, n); x++)
        g->sums[i0 + i + x] = sum[x] + (g->pc ? g->sums[i0 + i + x] : 0.f);
    for (long x = 0; !g->ta && x < 16; x++)
      for (long k = 0; k < depth; k += 32) {
        const a_t* src = g->a + (i0 + i + x) * g->K + g->pc + k;
        *(int16_unaligned*)(packed_a + (i + x) * ROW_BYTES + 2 * k) =
            ROW_OF_PAIRS(src, x < n ? g->kc - k : 0);
      }
  }
}

KERNEL static void multiply(void* args, int index) {
  const gemm_t* g = args;
  const long first = first_row(g, index), rows = first_row(g, index + 1) - first;
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
