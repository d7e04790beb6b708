/* Rows of X times a row of W, of float32, float16, or int8 with a scale for each row */

HOT float scaled(const gemv_t* g, long n, float y) { return g->scale ? y * g->scale[n] : y; }

/* y = row m of X times rows n of W */
HOT void dot_runs(const gemv_t* g, long m, const long n[RUNS], float y[RUNS]) {
  const long K = g->K;
  const act* x = g->x + m * K;
  const weight_t* w[RUNS];
  vfloat sum[RUNS][2];
  UNROLL for (int r = 0; r < RUNS; r++) {
    w[r] = g->weight + n[r] * K;
    sum[r][0] = sum[r][1] = (vfloat)0.f;
  }
  long k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES)
    UNROLL for (int r = 0; r < RUNS; r++) {
      /* of wider weights the processor fetches enough by itself */
      if (sizeof(weight_t) == 1) __builtin_prefetch(w[r] + k + 2048);
      UNROLL for (int j = 0; j < 2; j++)
        sum[r][j] += LOAD(x + k + j * LANES) * LOAD_WEIGHTS(w[r] + k + j * LANES);
    }
  UNROLL for (int r = 0; r < RUNS; r++) y[r] = vsum(sum[r][0] + sum[r][1]);
  for (; k < K; k++)
    for (int r = 0; r < RUNS; r++) y[r] += GET(x + k) * GET_WEIGHT(w[r] + k);
  for (int r = 0; r < RUNS; r++) y[r] = scaled(g, n[r], y[r]);
}

/* y = BLOCK rows of X from m on times row n of W */
HOT void dot_block(const gemv_t* g, long m, long n, float* y) {
  const long K = g->K;
  const act* x = g->x + m * K;
  const weight_t* w = g->weight + n * K;
  vfloat sum[BLOCK][2];
  UNROLL for (int i = 0; i < BLOCK; i++) sum[i][0] = sum[i][1] = (vfloat)0.f;
  long k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES)
    UNROLL for (int j = 0; j < 2; j++) {
      const vfloat v = LOAD_WEIGHTS(w + k + j * LANES);
      UNROLL for (int i = 0; i < BLOCK; i++) sum[i][j] += LOAD(x + i * K + k + j * LANES) * v;
    }
  UNROLL for (int i = 0; i < BLOCK; i++) y[i] = vsum(sum[i][0] + sum[i][1]);
  for (; k < K; k++)
    for (int i = 0; i < BLOCK; i++) y[i] += GET(x + i * K + k) * GET_WEIGHT(w + k);
  for (int i = 0; i < BLOCK; i++) y[i] = scaled(g, n, y[i]);
}
