/* The micro kernel of gemm.h in float32. Panels of A have GM rows. */

#if QUANTIZED
#include "gemm_quantized.h"
#else
/* packed_b[panel][k][GN] = op(B)[pc + k][jc + panel * GN + ...], zero where there is no column */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++) {
    const long j0 = g->jc + p * GN, n = MIN(g->N - j0, GN);
    float* dst = (float*)g->packed_b + p * GN * g->kc;
    const b_t* rows = g->b + j0 * g->K + g->pc;
    const long quads = g->kc / 4 * 4;
    for (long j = 0; g->tb && j < GN; j += 4) {
      const long from = j + 4 <= n ? quads : 0;
      for (long k = 0; k < from; k += 4) TRANSPOSE4(rows + j * g->K + k, g->K, dst + k * GN + j, GN);
      for (long k = from; k < g->kc; k++)
        for (long x = j; x < j + 4; x++) dst[k * GN + x] = x < n ? GET(rows + x * g->K + k) : 0.f;
    }
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
  const long first = index * g->rows, last = MIN(first + g->rows, g->M);
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
      if (rows == GM && cols == GN) {
        UNROLL for (int r = 0; r < GM; r++)
          UNROLL for (int x = 0; x < GV; x++) store_sums(g, i + r, j + x * LANES, sum[r][x]);
        continue;
      }
      float block[GM * GN];
      UNROLL for (int r = 0; r < GM; r++)
        UNROLL for (int x = 0; x < GV; x++) STORE(block + r * GN + x * LANES, sum[r][x]);
      store_block(g, i, j, block, GN, rows, cols);
    }
}
