/* Rows of X times a row of W, of float32, float16, or int8 with a scale for each row */

HOT float scaled(const gemv_t* g, long n, float y) { return g->scale ? y * g->scale[n] : y; }

/* row m of X times row n of W */
HOT float dot(const gemv_t* g, long m, long n) {
  const act* x = g->x + m * g->K;
  const weight_t* w = g->weight + n * g->K;
  vfloat sum[4];
  UNROLL for (int i = 0; i < 4; i++) sum[i] = (vfloat)0.f;
  long k = 0;
  for (; k + 4 * LANES <= g->K; k += 4 * LANES) {
    __builtin_prefetch((const char*)(w + k) + 2048);
    UNROLL for (int i = 0; i < 4; i++)
      sum[i] += LOAD(x + k + i * LANES) * LOAD_WEIGHTS(w + k + i * LANES);
  }
  for (; k + LANES <= g->K; k += LANES) sum[0] += LOAD(x + k) * LOAD_WEIGHTS(w + k);
  float y = vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; k < g->K; k++) y += GET(x + k) * GET_WEIGHT(w + k);
  return scaled(g, n, y);
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
