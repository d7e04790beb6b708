/* Tiles of attention.h whose steps are pairs of bfloat16: of neighbours in a row (load_rows,
 * load_transposed), or of one column in two rows (load_deep). */
typedef vint vsteps;
typedef float float4_of_pairs __attribute__((ext_vector_type(4), aligned(2)));

HOT vsteps load_steps(const step_t* p) { return *(const vint_unaligned*)p; }
HOT void store_steps(step_t* p, const vfloat x[PER]) {
  *(vint_unaligned*)p = to_pairs(x[0], x[1]);
}
HOT vfloat multiply_add(vfloat sum, vsteps a, vsteps b) { return dot_pairs(sum, a, b); }

/* dst (rows x DP / 2) = n rows of D, the rest zero */
HOT void load_rows(step_t* dst, const act* src, long stride, long n, long rows, long D, long DP) {
  part_t* to = (part_t*)dst;
  for (long r = 0; r < rows; r++) {
    long c = 0;
    if (r < n) {
      for (; c + LANES <= D; c += LANES)
        *(vbf16*)(to + r * DP + c) = *(const vbf16*)(src + r * stride + c);
      for (; c < D; c++) to[r * DP + c] = src[r * stride + c];
    }
    for (; c < DP; c++) to[r * DP + c] = 0;
  }
}

/* dst (n / 2 x DP) = n rows of D, the rest zero */
HOT void load_deep(step_t* dst, const act* src, long stride, long n, long D, long DP) {
  for (long r = 0; r < n; r += 2, dst += DP) {
    const act *low = src + r * stride, *high = r + 1 < n ? low + stride : 0;
    long c = 0;
    for (; c + LANES <= D; c += LANES) {
      const vuint l = __builtin_convertvector(*(const vbf16*)(low + c), vuint);
      const vuint h = high ? __builtin_convertvector(*(const vbf16*)(high + c), vuint) : (vuint)0;
      *(vint_unaligned*)(dst + c) = (vint)(l | h << 16);
    }
    for (; c < D; c++) dst[c] = (int)(low[c] | (high ? (unsigned)high[c] << 16 : 0));
    for (; c < DP; c++) dst[c] = 0;
  }
}

/* the pair at p, where so many numbers of its row are left */
HOT int pair_at(const act* p, long left) {
  return (int)(p[0] | (left > 1 ? (unsigned)p[1] << 16 : 0));
}

/* dst (D / 2 x cols) = the transpose of n rows of D, zero up to the next of COLS */
HOT void load_transposed(step_t* dst, const act* src, long stride, long n, long cols, long D) {
  long r = 0;
  for (; r + 4 <= n; r += 4) {
    long c = 0;
    for (; c + 4 <= D / 2; c += 4) {
      const act* p = src + r * stride + 2 * c;
      transpose4((float4)*(const float4_of_pairs*)p, (float4)*(const float4_of_pairs*)(p + stride),
                 (float4)*(const float4_of_pairs*)(p + 2 * stride),
                 (float4)*(const float4_of_pairs*)(p + 3 * stride),
                 (float*)dst + c * cols + r, cols);
    }
    for (; c < STEPS(D); c++)
      for (long x = r; x < r + 4; x++)
        dst[c * cols + x] = pair_at(src + x * stride + 2 * c, D - 2 * c);
  }
  for (; r < ROUND_UP(n, COLS); r++)
    for (long c = 0; c < STEPS(D); c++)
      dst[c * cols + r] = r < n ? pair_at(src + r * stride + 2 * c, D - 2 * c) : 0;
}
