/* The micro kernel of gemm.h on instructions that add the products of two pairs of bfloat16 to each
 * float32: AVX512_BF16's vdpbf16ps, Arm's bfdot. Panels of A have GM rows. */

/* panel[k / 2][GM] pairs of op(A) from row i0 on; with ta also the sums of the columns of A */
HOT void pack_a(const gemm_t* g, long i0, long n, int* panel) {
  const long depth = ROUND_UP(g->kc, 32), there = g->M - i0;
  float16 sum = (float16)0.f;
  for (long k = 0; k < depth; k += 32) {
    int16 r[16];
    for (long x = 0; g->ta && x < 16; x++) {
      const long at = k + 2 * x;
      const a_t* src = g->a + (g->pc + at) * g->M + i0;
      const float16 low = LOAD16(src, at < g->kc ? there : 0);
      const float16 high = LOAD16(src + g->M, at + 1 < g->kc ? there : 0);
      sum += low + high;
      r[x] = pairs(low, high);
    }
    for (long x = 0; !g->ta && x < 16; x++) {
      const a_t* src = g->a + (i0 + x) * g->K + g->pc + k;
      const long left = g->kc - k;
      r[x] = x < n ? row_of_pairs(LOAD16(src, left), LOAD16(src + 16, left - 16)) : (int16)0;
    }
    if (!g->ta) transpose16(r);
    for (long x = 0; x < 16; x++)   /* the next one overwrites what is behind GM rows */
      *(int16_unaligned*)(panel + (k / 2 + x) * GM) = r[x];
  }
  for (long x = 0; g->sums && !g->jc && x < n; x++)
    g->sums[i0 + x] = sum[x] + (g->pc ? g->sums[i0 + x] : 0.f);
}

/* sum = a panel of A times one of B, `steps` pairs deep */
HOT void block_kernel(const int* a, const int* b, long steps, vfloat sum[GM][GV]) {
  UNROLL for (int i = 0; i < GM; i++) UNROLL for (int j = 0; j < GV; j++) sum[i][j] = (vfloat)0.f;
  for (long k = 0; k < steps; k++) {
    vint row[GV];
    UNROLL for (int j = 0; j < GV; j++) row[j] = *(const vint_unaligned*)(b + k * GN + j * LANES);
    UNROLL for (int i = 0; i < GM; i++)
      UNROLL for (int j = 0; j < GV; j++)
        sum[i][j] = dot_pairs(sum[i][j], (vint)a[k * GM + i], row[j]);
  }
}

KERNEL static void multiply(void* args, int index) {
  const gemm_t* g = args;
  const long first = index * g->rows, last = MIN(first + g->rows, g->M);
  const long steps = ROUND_UP(g->kc, 32) / 2, stride = steps * GM + 16;
  int packed_a[MC / GM * (KC / 2 * GM + 16)] __attribute__((aligned(64)));
  for (long i = first; i < last; i += GM)
    pack_a(g, i, MIN(last - i, GM), packed_a + (i - first) / GM * stride);
  for (long j = 0; j < g->nc; j += GN)
    for (long i = first; i < last; i += GM) {
      vfloat sum[GM][GV];
      float block[GM * GN];
      block_kernel(packed_a + (i - first) / GM * stride, (const int*)g->packed_b + j * steps, steps,
                   sum);
      UNROLL for (int r = 0; r < GM; r++)
        UNROLL for (int x = 0; x < GV; x++) STORE(block + r * GN + x * LANES, sum[r][x]);
      store_block(g, i, j, block, GN, MIN(last - i, GM), MIN(g->nc - j, GN));
    }
}
