/* Packs B (N x K) of few bits, with tb, for the micro kernel of gemm_float.h: each task widens four
 * rows of B at a time, once for all rows of A. */

/* packed_b[panel][k][GN] = B[jc + panel * GN + ...][pc + k], zero where there is no row of B */
KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  float rows[4 * KC] __attribute__((aligned(64)));
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++)
    for (long j = 0; j < GN; j += 4) {
      float* dst = (float*)g->packed_b + p * GN * g->kc + j;
      for (long x = 0; x < 4; x++) {
        const long n = g->jc + p * GN + j + x;
        if (n < g->N)
          load_weights(rows + x * KC, g->b, g->scale, n, g->K, g->pc, g->pc + g->kc);
        else
          for (long k = 0; k < g->kc; k++) rows[x * KC + k] = 0.f;
      }
      long k = 0;
      for (; k + 4 <= g->kc; k += 4) TRANSPOSE4(rows + k, KC, dst + k * GN, GN);
      for (; k < g->kc; k++)
        for (long x = 0; x < 4; x++) dst[k * GN + x] = rows[x * KC + k];
    }
}
