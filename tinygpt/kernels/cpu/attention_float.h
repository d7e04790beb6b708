/* Tiles of attention.h whose steps are numbers. load_rows and load_deep are one: a step of a row is
 * a number of it, and so is a step of a column. */
typedef vfloat vsteps;

HOT vsteps load_steps(const step_t* p) { return LOAD(p); }
HOT void store_steps(step_t* p, const vfloat x[PER]) { STORE(p, x[0]); }
HOT vfloat multiply_add(vfloat sum, vsteps a, vsteps b) { return sum + a * b; }

/* dst (rows x DP) = n rows of D, the rest zero */
HOT void load_rows(step_t* dst, const act* src, long stride, long n, long rows, long D, long DP) {
  for (long r = 0; r < rows; r++) {
    long c = 0;
    if (r < n) {
      for (; c + LANES <= D; c += LANES) STORE(dst + r * DP + c, LOAD(src + r * stride + c));
      for (; c < D; c++) dst[r * DP + c] = GET(src + r * stride + c);
    }
    for (; c < DP; c++) dst[r * DP + c] = 0.f;
  }
}
HOT void load_deep(step_t* dst, const act* src, long stride, long n, long D, long DP) {
  load_rows(dst, src, stride, n, n, D, DP);
}

/* dst (D x cols) = the transpose of n rows of D, zero up to the next of COLS */
HOT void load_transposed(step_t* dst, const act* src, long stride, long n, long cols, long D) {
  long r = 0;
  for (; r + 4 <= n; r += 4) {
    long c = 0;
    for (; c + 4 <= D; c += 4) TRANSPOSE4(src + r * stride + c, stride, dst + c * cols + r, cols);
    for (; c < D; c++)
      for (long x = r; x < r + 4; x++) dst[c * cols + x] = GET(src + x * stride + c);
  }
  for (; r < ROUND_UP(n, COLS); r++)
    for (long c = 0; c < D; c++) dst[c * cols + r] = r < n ? GET(src + r * stride + c) : 0.f;
}
