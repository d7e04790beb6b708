/* Packs B (N x K) of few bits, with tb, for the micro kernel of gemm_float.h: each task widens some
 * rows of B at a time, once for all rows of A. */
#define PIECE 128   /* of a row that is widened at a time, whole groups */

/* packed_b[panel][k][GN] = B[jc + panel * GN + ...][pc + k], zero where there is no row of B */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  float rows[AT_ONCE * PIECE] __attribute__((aligned(64)));
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++)
    for (long j = 0; j < GN; j += AT_ONCE) {
      const long n0 = g->jc + p * GN + j, n = MIN(g->N - n0, AT_ONCE);
      float* dst = (float*)g->packed_b + p * GN * g->kc + j;
      for (long k = 0; k < g->kc; k += PIECE) {
        const long end = MIN(k + PIECE, g->kc);
        for (long x = 0; x < n; x++)
          load_weights(rows + x * PIECE, g->b, g->scale, n0 + x, g->K, g->pc + k, g->pc + end);
        transpose_rows(dst + k * GN, rows, PIECE, n, end - k);
      }
    }
}
