/* The micro kernel of gemm.h in float32. Panels of A have GM rows. */

#define AT_ONCE (LANES == 16 ? 16 : 4)   /* rows */
#if QUANTIZED
typedef float row_t;
#else
typedef b_t row_t;
#endif

/* dst[k][GN] = AT_ONCE rows of n, ld apart, kc long and zero where there is none, transposed */
HOT void transpose_rows(float* dst, const row_t* rows, long ld, long n, long kc) {
  long k = 0;
#if LANES == 16
  for (; k + 16 <= kc; k += 16) {
    int16 r[16];
    UNROLL for (long j = 0; j < 16; j++) r[j] = j < n ? (int16)LOAD(rows + j * ld + k) : (int16)0;
    transpose16(r);
    UNROLL for (long x = 0; x < 16; x++) *(int16_unaligned*)(dst + (k + x) * GN) = r[x];
  }
#else
  for (; n >= 4 && k + 4 <= kc; k += 4) TRANSPOSE4(rows + k, ld, dst + k * GN, GN);
#endif
  for (; k < kc; k++)
    for (long j = 0; j < AT_ONCE; j++) dst[k * GN + j] = j < n ? GET(rows + j * ld + k) : 0.f;
}

#if QUANTIZED
#include "gemm_quantized.h"
#else
/* packed_b[panel][k][GN] = op(B)[pc + k][jc + panel * GN + ...], zero where there is no column */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++) {
    const long j0 = g->jc + p * GN, n = MIN(g->N - j0, GN);
    float* dst = (float*)g->packed_b + p * GN * g->kc;
    for (long j = 0; g->tb && j < GN; j += AT_ONCE)
      transpose_rows(dst + j, g->b + (j0 + j) * g->K + g->pc, g->K, n - j, g->kc);
    for (long k = 0; !g->tb && k < g->kc; k++) {
      const b_t* src = g->b + (g->pc + k) * g->N + j0;
      if (n == GN)
        UNROLL for (int x = 0; x < GV; x++) STORE(dst + k * GN + x * LANES, LOAD(src + x * LANES));
      else
        for (long x = 0; x < GN; x++) dst[k * GN + x] = x < n ? GET(src + x) : 0.f;
    }
  }
}
#endif

/* packed[panel][k][GM] = rows first .. last of A^T: of all panels in turn, so that a page of A is
 * read from once */
HOT void pack_columns(const gemm_t* g, long first, long last, float* packed, long stride) {
  for (long k = 0; k < g->kc; k++) {
    const a_t* src = g->a + (g->pc + k) * g->M;
    float* dst = packed + k * GM;
    for (long i = first; i < last; i += GM, dst += stride) {
      __builtin_prefetch(src + i + 16 * g->M);
      if (last - i >= GM)
        UNROLL for (int r = 0; r < GM; r++) dst[r] = GET(src + i + r);
      else
        for (long r = 0; r < GM; r++) dst[r] = i + r < last ? GET(src + i + r) : 0.f;
    }
  }
}

/* panel[k][GM] = A[i0 + ...][pc + k], zero where there is no row */
HOT void pack_rows(const gemm_t* g, long i0, long n, float* panel) {
  const a_t* src = g->a + i0 * g->K + g->pc;
  const long quads = n == GM ? g->kc / 4 * 4 : 0;
  for (long k = 0; k < quads; k += 4) {
    UNROLL for (int x = 0; x < GM; x += 4) {
      const int r = MIN(x, GM - 4);
      TRANSPOSE4(src + r * g->K + k, g->K, panel + k * GM + r, GM);
    }
  }
  for (long k = quads; k < g->kc; k++)
    for (long r = 0; r < GM; r++) panel[k * GM + r] = r < n ? GET(src + r * g->K + k) : 0.f;
}

/* sums[i ...] = or += those of a panel's rows over its depth */
HOT void add_rows(const gemm_t* g, long i, long rows, const float* panel) {
  float sum[GM] = {};
  for (long k = 0; k < g->kc; k++) UNROLL for (int r = 0; r < GM; r++) sum[r] += panel[k * GM + r];
  for (long r = 0; r < rows; r++) g->sums[i + r] = sum[r] + (g->pc ? g->sums[i + r] : 0.f);
}

/* sum = A (GM x kc) times a panel of B: A(i,k) = a[i * ai + k * ak] */
HOT void block_kernel(const float* a, long ai, long ak, const float* b, long kc,
                      vfloat sum[GM][GV]) {
  UNROLL for (int i = 0; i < GM; i++) UNROLL for (int j = 0; j < GV; j++) sum[i][j] = (vfloat)0.f;
  for (long k = 0; k < kc; k++) {
    vfloat row[GV];
    UNROLL for (int j = 0; j < GV; j++) row[j] = LOAD(b + k * GN + j * LANES);
    UNROLL for (int i = 0; i < GM; i++) {
      vfloat x = (vfloat)a[i * ai + k * ak];
      UNROLL for (int j = 0; j < GV; j++) sum[i][j] += x * row[j];
    }
  }
}

KERNEL static void multiply(void* args, int index) {
  const gemm_t* g = args;
  const long first = first_row(g, index), last = first_row(g, index + 1);
  const long stride = g->kc * GM + 16;              /* + 16: panels must not share a cache set */
  /* where C is narrow, packing A costs more than it saves, unless a block has so many rows that
   * their addresses do not fit into registers */
  const int packs = GM > 8 || sizeof(a_t) < sizeof(float) || g->ta || g->N > 256;
  float packed_a[MC / GM * (KC * GM + 16)] __attribute__((aligned(64)));
  if (g->ta) pack_columns(g, first, last, packed_a, stride);
  for (long i = first; i < last; i += GM) {
    float* panel = packed_a + (i - first) / GM * stride;
    const long rows = MIN(last - i, GM);
    if (!g->ta && (packs || rows < GM)) pack_rows(g, i, rows, panel);
    if (g->sums && !g->jc) add_rows(g, i, rows, panel);
  }
  for (long j = 0; j < g->nc; j += GN)
    for (long i = first; i < last; i += GM) {
      const long rows = MIN(last - i, GM), cols = MIN(g->nc - j, GN);
      const float* b = (const float*)g->packed_b + j * g->kc;
      vfloat sum[GM][GV];
      if (g->symmetric && g->jc + j + cols <= i) continue;
      UNROLL for (int r = 0; r < GM; r++) __builtin_prefetch(partial_sums(g, i + r, j), 1);
      if (packs || rows < GM)
        block_kernel(packed_a + (i - first) / GM * stride, 1, GM, b, g->kc, sum);
      else
        block_kernel((const float*)g->a + i * g->K + g->pc, g->K, 1, b, g->kc, sum);
      store_vectors(g, i, j, sum, rows, cols);
    }
}
