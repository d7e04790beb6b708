/* The micro kernel of gemm.h on instructions that add the products of two pairs of bfloat16 to each
 * float32: AVX512_BF16's vdpbf16ps, Arm's bfdot. Panels of A have GM rows. */

#define A_STRIDE(depth) ((depth) / 2 * GM + 16)   /* + 16: panels must not share a cache set */
#define B_STRIDE(depth) ((depth) / 2 * GN)

/* packed[panel][k / 2][GM] pairs of rows first .. last of A; a vector is stored whole, and the next
 * one overwrites what is behind GM rows */
HOT void pack_rows(const gemm_t* g, long first, long last, long depth, int* packed) {
  for (long i = first; i < last; i += GM, packed += A_STRIDE(depth))
    for (long k = 0; k < depth; k += 32) {
      const a_t* src = g->a + i * g->K + g->pc + k;
      int16 r[16];
      UNROLL for (long x = GM; x < 2 * GM; x++) __builtin_prefetch(src + x * g->K);  /* the next */
      for (long x = 0; x < 16; x++)
        r[x] = x < MIN(last - i, GM) ? ROW_OF_PAIRS(src + x * g->K, g->kc - k) : (int16)0;
      transpose16(r);
      for (long x = 0; x < 16; x++) *(int16_unaligned*)(packed + (k / 2 + x) * GM) = r[x];
    }
}

/* the same of columns of A's storage, and their sums; BURST depths of all panels in turn, so that a
 * line of the cache is read once */
#define BURST 32
HOT void pack_columns(const gemm_t* g, long first, long last, long depth, int* packed) {
  float16 sums[MC / GM];
  for (long p = 0; p < MC / GM; p++) sums[p] = (float16)0.f;
  for (long from = 0; from < depth; from += BURST)
    for (long i = first; i < last; i += GM) {
      const long p = (i - first) / GM, there = g->M - i;
      float16 sum = sums[p];
      for (long k = from; k < from + BURST; k += 2) {
        const a_t* src = g->a + (g->pc + k) * g->M + i;
        __builtin_prefetch(src + BURST * g->M);
        __builtin_prefetch(src + (BURST + 1) * g->M);
        const int16 r = PAIRS(src, src + g->M, k < g->kc ? there : 0, k + 1 < g->kc ? there : 0);
        *(int16_unaligned*)(packed + p * A_STRIDE(depth) + k / 2 * GM) = r;
        sum += sums_of_pairs(r);
      }
      sums[p] = sum;
    }
  for (long i = first; g->sums && !g->jc && i < last; i++)
    g->sums[i] = sums[(i - first) / GM][(i - first) % GM] + (g->pc ? g->sums[i] : 0.f);
}

HOT void pack_a(const gemm_t* g, long first, long last, long depth, int* packed) {
  if (g->ta)
    pack_columns(g, first, last, depth, packed);
  else
    pack_rows(g, first, last, depth, packed);
}

/* sum = a panel of A times one of B */
HOT void block_kernel(const int* a, const int* b, long depth, vfloat sum[GM][GV]) {
  UNROLL for (int i = 0; i < GM; i++) UNROLL for (int j = 0; j < GV; j++) sum[i][j] = (vfloat)0.f;
  for (long k = 0; k < depth / 2; k++) {
    vint row[GV];
    UNROLL for (int j = 0; j < GV; j++) row[j] = *(const vint_unaligned*)(b + k * GN + j * LANES);
    UNROLL for (int i = 0; i < GM; i++)
      UNROLL for (int j = 0; j < GV; j++)
        sum[i][j] = dot_pairs(sum[i][j], (vint)a[k * GM + i], row[j]);
  }
}
