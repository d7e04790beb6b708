/* The loops around the micro kernels of gemm_float.h, with AMX 1 gemm_amx.h, with DOT 1 gemm_dot.h,
 * and with VNNI 1 gemm_vnni.h, as BLIS has them (Van Zee and van de Geijn, ACM TOMS 2015), and the
 * way from a block to C. A file that includes this one includes one of those after its entry.
 *
 *   C (M x N) = op(A) op(B) + bias + residual, all row-major
 *
 * Columns of C go in strips of NC and the depth in slices of KC; all threads pack the slice of B
 * into panels of GN columns, then each task packs rows of A and multiplies.
 *
 * ta, tb: 1 where A (K x M) or B (N x K) is stored transposed. a_t, b_t and c_t are the types
 * of the matrices' elements; bias is float32, the residual of C's type. With ta the column sums of A's
 * storage, the gradient of a bias, are written to `sums` where there is one. A C of 16 bits is
 * summed up in `partial` (M x MIN(N, NC)) where the depth has several slices. A C that is
 * `symmetric` is computed above its diagonal and copied below.
 */
#include "pool.h"
#include "vector.h"
#include "transpose16.h"
#if QUANTIZED
typedef b_t weight_t;
#include "weight.h"
#else
typedef float scale_t;
#endif

#if AMX || DOT
#include "dot_pairs.h"
#endif

/* a block of C is GM x GN, a task's part of A MC x KC, and what is packed of B KC x NC */
#if AMX
#define GM 32
#define GN 32
#define MC 128
#define NC 512
#define KC 1024
#elif DOT || VNNI
#define GM (LANES == 4 ? 6 : 12)
#define GV (LANES == 4 ? 4 : 2)
#define GN (GV * LANES)
#define MC 144                 /* MC x KC of A are less than half of an L2 of 1 MB */
#define NC 1536
#define KC 1536
#else
#if defined(__AVX__)
#define GM (LANES == 16 ? 12 : 6)
#define GV 2
#define MC (LANES == 16 ? 144 : 96)  /* MC x KC of A are less than half of an L2 of 1 MB, or of
                                      * one of 512 KB */
#define NC 1536
#define KC 768
#else
#define GM 8
#define GV 3
#define MC 192
#define NC (GN * (512 / GN))
#define KC 512
#endif
#define GN (GV * LANES)
#endif

typedef struct {
  const a_t* a;
  const b_t* b;
  const scale_t* scale;         /* of B, where it is QUANTIZED (weight.h) */
  const float* bias;
  const c_t* residual;
  c_t* c;
  float *partial, *sums;
  void* packed_b;
  long M, N, K;
  int ta, tb, symmetric;
  long jc, nc, pc, kc;          /* the strip of columns and the slice of depth at hand */
  long tasks;                   /* that share the rows of C */
  long panels;                  /* of B that a task packs */
} gemm_t;

static void pack_b(void* args, int index);
static void multiply(void* args, int index);

/* the first row of C of a task: blocks are shared as evenly as they can be */
HOT long first_row(const gemm_t* g, long task) {
  return MIN((g->M + GM - 1) / GM * task / g->tasks * GM, g->M);
}

/* C = op(A) op(B) + bias + residual */
HOT void product(pool_t* pool, gemm_t* g) {
  /* as many tasks for each thread, and few, since each reads all that is packed of B */
  g->tasks = MIN(ROUND_UP((g->M + MC - 1) / MC, (long)pool->threads), (g->M + GM - 1) / GM);
  /* slices of about one depth */
  const long slices = (g->K + KC - 1) / KC, depth = ROUND_UP((g->K + slices - 1) / slices, 32);
  for (g->jc = 0; g->jc < g->N; g->jc += NC) {
    g->nc = MIN(g->N - g->jc, NC);
    for (g->pc = 0; g->pc < g->K; g->pc += depth) {
      g->kc = MIN(g->K - g->pc, depth);
      g->panels = g->nc >= 4 * GN * (long)pool->threads ? 4 : 1;
      parallel_for(pool, pack_b, g, (g->nc + g->panels * GN - 1) / (g->panels * GN));
      parallel_for(pool, multiply, g, g->tasks);
    }
  }
  for (long i = 0; g->symmetric && i < g->M; i++)
    for (long j = 0; j < i; j++) g->c[i * g->N + j] = g->c[j * g->N + i];
}

/* where sums of earlier slices stand for C[i][jc + j ...] */
HOT float* partial_sums(const gemm_t* g, long i, long j) {
  if (sizeof(c_t) < sizeof(float)) return g->partial + i * MIN(g->N, NC) + j;
  return (float*)g->c + i * g->N + g->jc + j;
}

/* x, LANES sums of this slice, to C[i][jc + j ...]: on top of what earlier slices left, and behind
 * the last one with bias and residual */
HOT void store_sums(const gemm_t* g, long i, long j, vfloat x) {
  const long at = i * g->N + g->jc + j;
  if (g->pc) x += LOAD(partial_sums(g, i, j));
  if (g->pc + g->kc < g->K) {
    STORE(partial_sums(g, i, j), x);
    return;
  }
  if (g->bias) x += LOAD(g->bias + g->jc + j);
  if (g->residual) x += LOAD(g->residual + at);
  STORE(g->c + at, x);
}

/* the same for one sum */
HOT void store_sum(const gemm_t* g, long i, long j, float x) {
  const long at = i * g->N + g->jc + j;
  if (g->pc) x += *partial_sums(g, i, j);
  if (g->pc + g->kc < g->K) {
    *partial_sums(g, i, j) = x;
    return;
  }
  if (g->bias) x += g->bias[g->jc + j];
  if (g->residual) x += GET(g->residual + at);
  PUT(g->c + at, x);
}

/* a block of rows x cols with row stride ld, to C[i ...][jc + j ...] */
HOT void store_block(const gemm_t* g, long i, long j, const float* block, long ld, long rows,
                     long cols) {
  for (long r = 0; r < rows; r++) {
    long x = 0;
    for (; x + LANES <= cols; x += LANES) store_sums(g, i + r, j + x, LOAD(block + r * ld + x));
    for (; x < cols; x++) store_sum(g, i + r, j + x, block[r * ld + x]);
  }
}

#if !AMX
/* the same of a block in vectors */
HOT void store_vectors(const gemm_t* g, long i, long j, vfloat sum[GM][GV], long rows, long cols) {
  if (rows == GM && cols == GN) {
    UNROLL for (int r = 0; r < GM; r++)
      UNROLL for (int x = 0; x < GV; x++) store_sums(g, i + r, j + x * LANES, sum[r][x]);
    return;
  }
  float block[GM * GN];
  UNROLL for (int r = 0; r < GM; r++)
    UNROLL for (int x = 0; x < GV; x++) STORE(block + r * GN + x * LANES, sum[r][x]);
  store_block(g, i, j, block, GN, rows, cols);
}
#endif
