/* What a task of gemm.h does with the micro kernels of gemm_dot.h and gemm_vnni.h, whose panels hold
 * pairs of depths: it packs its rows of A, and multiplies them by all panels of B. */

KERNEL static void multiply(void* args, int index) {
  const gemm_t copy = *(const gemm_t*)args;   /* which no store of a float can change */
  const gemm_t* g = &copy;
  const long first = first_row(g, index), last = first_row(g, index + 1);
  const long depth = ROUND_UP(g->kc, 32);
  int packed_a[MC / GM * A_STRIDE(KC)] __attribute__((aligned(64)));
  pack_a(g, first, last, depth, packed_a);
  for (long j = 0; j < g->nc; j += GN)
    for (long i = first; i < last; i += GM) {
      const long rows = MIN(last - i, GM), cols = MIN(g->nc - j, GN);
      vfloat sum[GM][GV];
      UNROLL for (int r = 0; r < GM; r++) {
        const long at = (i + r) * g->N + g->jc + j;
        __builtin_prefetch(g->c + at, 1);
        if (g->residual) __builtin_prefetch(g->residual + at);
      }
      block_kernel(packed_a + (i - first) / GM * A_STRIDE(depth),
                   (const int*)g->packed_b + j / GN * B_STRIDE(depth), depth, sum);
      store_vectors(g, i, j, sum, rows, cols);
    }
}
