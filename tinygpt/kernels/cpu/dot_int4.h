/* Rows of X times a row of W of four bits, a group of GROUP weights at a time */

/* the sum of the products of n numbers of x, GROUP at most, and of a group's weights, by lanes */
HOT vfloat products(const act* x, long n, const vfloat* w) {
  act padded[GROUP];
  if (n < GROUP) {
    for (int i = 0; i < GROUP; i++) PUT(padded + i, i < n ? GET(x + i) : 0.f);
    x = padded;
  }
  vfloat sum = LOAD(x) * w[0];
  UNROLL for (int i = 1; i < GROUP / LANES; i++) sum += LOAD(x + i * LANES) * w[i];
  return sum;
}

/* y = row m of X times rows n of W */
HOT void dot_runs(const gemv_t* g, long m, const long n[RUNS], float y[RUNS]) {
  const long K = g->K, groups = (K + GROUP - 1) / GROUP;
  const act* x = g->x + m * K;
  vfloat sum[RUNS], w[GROUP / LANES];
  UNROLL for (int r = 0; r < RUNS; r++) sum[r] = (vfloat)0.f;
  long i = 0;
  for (; (i + 4) * GROUP <= K; i += 4)
    UNROLL for (int r = 0; r < RUNS; r++) {
      const long at = n[r] * groups + i;
      const float4 scales = LOAD4(g->scale + at);
      __builtin_prefetch(g->weight + at * GROUP / 2 + 1024);
      UNROLL for (int u = 0; u < 4; u++) {
        load_group(g->weight + (at + u) * GROUP / 2, w);
        sum[r] += products(x + (i + u) * GROUP, GROUP, w) * scales[u];
      }
    }
  for (; i < groups; i++)
    for (int r = 0; r < RUNS; r++) {
      const long at = n[r] * groups + i;
      load_group(g->weight + at * GROUP / 2, w);
      sum[r] += products(x + i * GROUP, K - i * GROUP, w) * GET(g->scale + at);
    }
  UNROLL for (int r = 0; r < RUNS; r++) y[r] = vsum(sum[r]);
}

/* y = BLOCK rows of X from m on times row n of W */
HOT void dot_block(const gemv_t* g, long m, long n, float* y) {
  const long K = g->K, groups = (K + GROUP - 1) / GROUP;
  const act* x = g->x + m * K;
  vfloat sum[BLOCK], w[GROUP / LANES];
  UNROLL for (int r = 0; r < BLOCK; r++) sum[r] = (vfloat)0.f;
  for (long i = n * groups, k = 0; k < K; i++, k += GROUP) {
    load_group(g->weight + i * GROUP / 2, w);
    UNROLL for (int r = 0; r < BLOCK; r++)
      sum[r] += products(x + r * K + k, K - k, w) * GET(g->scale + i);
  }
  UNROLL for (int r = 0; r < BLOCK; r++) y[r] = vsum(sum[r]);
}
