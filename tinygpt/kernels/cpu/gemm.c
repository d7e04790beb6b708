/* C (M x N) = op(A) op(B) + bias + residual in float32, all row-major.
 *
 * The structure is BLIS's (Van Zee and van de Geijn, ACM TOMS 2015): columns of C in strips of NC
 * and the depth in slices of KC; all threads pack the slice of B into panels of GN columns, then
 * each task packs rows of A into panels of GM and runs the micro kernel over them.
 *
 * TA, TB: 1 where A (K x M) or B (N x K) is stored transposed. With TA the column sums of A's
 * storage, the gradient of a bias, are written to sums where WITH_SUMS.
 */
#include "pool.h"
#include "vector.h"

#if LANES == 16
#define GM 12
#define GV 2
#elif LANES == 8
#define GM 6
#define GV 2
#else
#define GM 8
#define GV 3
#endif
#define GN (GV * LANES)
#define MC (GM * (192 / GM))
#define NC (GN * (512 / GN))
#define KC 512

typedef struct {
  const float *a, *b, *bias, *residual;
  float *c, *sums, *packed_b;
  long M, N, K;
  long jc, nc, pc, kc;          /* the strip of columns and the slice of depth at hand */
  long rows;                    /* of C in a task, a multiple of GM */
  long panels;                  /* of B that a task packs */
} gemm_t;

static void pack_b(void* args, int index);
static void multiply(void* args, int index);

KERNEL void NAME(ARGUMENTS const long* dims, const u64* table) {
  pool_t* pool = (pool_t*)table[0];
  gemm_t g = {.a = a, .b = b, .bias = BIAS, .residual = RESIDUAL, .c = c, .sums = SUMS,
              .packed_b = (float*)table[1], .M = dims[0], .N = dims[1], .K = dims[2]};
  /* two tasks a thread, so that a late thread costs little */
  const long share = (g.M + 2 * pool->threads - 1) / (2 * pool->threads);
  g.rows = MIN(ROUND_UP(share, GM), MC);
  for (g.jc = 0; g.jc < g.N; g.jc += NC) {
    g.nc = MIN(g.N - g.jc, NC);
    for (g.pc = 0; g.pc < g.K; g.pc += KC) {
      g.kc = MIN(g.K - g.pc, KC);
      g.panels = g.nc >= 4 * GN * (long)pool->threads ? 4 : 1;
      parallel_for(pool, pack_b, &g, (g.nc + g.panels * GN - 1) / (g.panels * GN));
      parallel_for(pool, multiply, &g, (g.M + g.rows - 1) / g.rows);
    }
  }
}

/* packed_b[panel][k][GN] = op(B)[pc + k][jc + panel * GN + ...], zero where there is no column */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++) {
    const long j0 = g->jc + p * GN, n = MIN(g->N - j0, GN);
    float* dst = g->packed_b + p * GN * g->kc;
#if TB
    const float* src = g->b + j0 * g->K + g->pc;
    const long quads = g->kc / 4 * 4;
    for (long j = 0; j < GN; j += 4) {
      const long from = j + 4 <= n ? quads : 0;
      for (long k = 0; k < from; k += 4) transpose4(src + j * g->K + k, g->K, dst + k * GN + j, GN);
      for (long k = from; k < g->kc; k++)
        for (long x = j; x < j + 4; x++) dst[k * GN + x] = x < n ? src[x * g->K + k] : 0.f;
    }
#else
    for (long k = 0; k < g->kc; k++) {
      const float* src = g->b + (g->pc + k) * g->N + j0;
      if (n == GN)
        UNROLL for (int x = 0; x < GV; x++) STORE(dst + k * GN + x * LANES, LOAD(src + x * LANES));
      else
        for (long x = 0; x < GN; x++) dst[k * GN + x] = x < n ? src[x] : 0.f;
    }
#endif
  }
}

/* panel[k][GM] = op(A)[i0 + ...][pc + k], zero where there is no row */
HOT void pack_a(const gemm_t* g, long i0, long n, float* panel) {
#if TA
  for (long k = 0; k < g->kc; k++) {
    const float* src = g->a + (g->pc + k) * g->M + i0;
    float* dst = panel + k * GM;
    if (n == GM)
      UNROLL for (int r = 0; r < GM; r++) dst[r] = src[r];
    else
      for (long r = 0; r < GM; r++) dst[r] = r < n ? src[r] : 0.f;
  }
#else
  const float* src = g->a + i0 * g->K + g->pc;
  const long quads = n == GM ? g->kc / 4 * 4 : 0;
  for (long k = 0; k < quads; k += 4) {
    UNROLL for (int r = 0; r + 4 <= GM; r += 4)
      transpose4(src + r * g->K + k, g->K, panel + k * GM + r, GM);
    UNROLL for (int r = GM / 4 * 4; r < GM; r++)
      UNROLL for (int x = 0; x < 4; x++) panel[(k + x) * GM + r] = src[r * g->K + k + x];
  }
  for (long k = quads; k < g->kc; k++)
    for (long r = 0; r < GM; r++) panel[k * GM + r] = r < n ? src[r * g->K + k] : 0.f;
#endif
}

HOT void block_kernel(const float* a, const float* b, long kc, vfloat sum[GM][GV]) {
  UNROLL for (int i = 0; i < GM; i++) UNROLL for (int j = 0; j < GV; j++) sum[i][j] = (vfloat)0.f;
  for (long k = 0; k < kc; k++) {
    vfloat row[GV];
    UNROLL for (int j = 0; j < GV; j++) row[j] = LOAD(b + k * GN + j * LANES);
    UNROLL for (int i = 0; i < GM; i++) {
      vfloat x = (vfloat)a[k * GM + i];
      UNROLL for (int j = 0; j < GV; j++) sum[i][j] += x * row[j];
    }
  }
}

/* C[i][j] of a whole block: what earlier slices of the depth left there, or bias and residual */
HOT void store_block(const gemm_t* g, long i0, long j0, vfloat sum[GM][GV]) {
  float* c = g->c + i0 * g->N + j0;
  UNROLL for (int i = 0; i < GM; i++)
    UNROLL for (int j = 0; j < GV; j++) {
      const long at = i * g->N + j * LANES;
      vfloat x = sum[i][j];
      if (g->pc) x += LOAD(c + at);
      else {
        if (g->bias) x += LOAD(g->bias + j0 + j * LANES);
        if (g->residual) x += LOAD(g->residual + i0 * g->N + j0 + at);
      }
      STORE(c + at, x);
    }
}

HOT void store_edge(const gemm_t* g, long i0, long rows, long j0, long cols, vfloat sum[GM][GV]) {
  float block[GM][GN];
  UNROLL for (int i = 0; i < GM; i++)
    UNROLL for (int j = 0; j < GV; j++) STORE(block[i] + j * LANES, sum[i][j]);
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < cols; j++) {
      const long at = (i0 + i) * g->N + j0 + j;
      float x = block[i][j];
      if (g->pc) x += g->c[at];
      else x += (g->bias ? g->bias[j0 + j] : 0.f) + (g->residual ? g->residual[at] : 0.f);
      g->c[at] = x;
    }
}

KERNEL static void multiply(void* args, int index) {
  const gemm_t* g = args;
  const long first = index * g->rows, last = MIN(first + g->rows, g->M);
  const long stride = g->kc * GM + 16;              /* + 16: panels must not share a cache set */
  float packed_a[MC / GM * (KC * GM + 16)] __attribute__((aligned(64)));
  for (long i = first; i < last; i += GM) {
    float* panel = packed_a + (i - first) / GM * stride;
    const long rows = MIN(last - i, GM);
    pack_a(g, i, rows, panel);
    if (g->sums && !g->jc)
      for (long r = 0; r < rows; r++) {
        float s = g->pc ? g->sums[i + r] : 0.f;
        for (long k = 0; k < g->kc; k++) s += panel[k * GM + r];
        g->sums[i + r] = s;
      }
  }
  for (long j = 0; j < g->nc; j += GN)
    for (long i = first; i < last; i += GM) {
      const long rows = MIN(last - i, GM), cols = MIN(g->nc - j, GN);
      vfloat sum[GM][GV];
      block_kernel(packed_a + (i - first) / GM * stride, g->packed_b + j * g->kc, g->kc, sum);
      if (rows == GM && cols == GN) store_block(g, i, g->jc + j, sum);
      else store_edge(g, i, rows, g->jc + j, cols, sum);
    }
}
