/* ---- Weights of 8 bits in panels of pairs, (ceil(N / PANEL), ceil(K / 2), PANEL, 2), since
 * WebAssembly multiplies pairs of 16-bit numbers and adds them in one instruction, and no weight
 * has to become a float. Inputs become whole numbers of 24 bits, as exact as floats, in two halves:
 * x[k] = (high[k] * 2^BITS + low[k]) * step. */

enum { PANEL = 16, VECTORS = PANEL / 4 };

typedef struct { float step; int16_t high[LONGEST + 1], low[LONGEST + 1]; } input_t;

static size_t panel_size(int K) { return (size_t)(K + 1) / 2 * 2 * PANEL; }

static inline float weight_of(const weight_t *panel, int k, int i) {
  return (float)panel[((size_t)(k / 2) * PANEL + i) * 2 + k % 2];
}

static void round_to_whole(input_t *y, const float *x, int K) {
  static float sizes[LONGEST];
  for (int k = 0; k < K; k++) sizes[k] = __builtin_fabsf(x[k]);
  const float top = largest(sizes, K), most = (1 << (2 * BITS - 1)) - 1;
  const float steps = top > 0.f ? most / top : 0.f;
  y->step = top / most;
  for (int k = 0; k < K; k++) {
    const int32_t whole = (int32_t)(x[k] * steps + (x[k] < 0.f ? -0.5f : 0.5f));
    y->high[k] = (int16_t)((whole + (1 << (BITS - 1))) >> BITS);
    y->low[k] = (int16_t)(whole - y->high[k] * (1 << BITS));
  }
  if (K % 2) y->high[K] = y->low[K] = 0;
}

/* x (T, K) as multiply_rows takes it */
static const input_t *prepare(const float *x, int T, int K) {
  static input_t inputs[CHUNK];
  for (int t = 0; t < T; t++) round_to_whole(&inputs[t], x + (size_t)t * K, K);
  return inputs;
}

/* y (PANEL) = x (K) times a panel */
static void multiply(float *restrict y, const input_t *restrict x, const weight_t *restrict panel,
                     int K) {
  v128_t high[VECTORS] = {0}, low[VECTORS] = {0};
  for (int k = 0; k < K; k += 2, panel += 2 * PANEL) {
    const v128_t x_high = wasm_v128_load32_splat(x->high + k);
    const v128_t x_low = wasm_v128_load32_splat(x->low + k);
    for (int i = 0; i < VECTORS; i++) {
      const v128_t w = wasm_i16x8_load8x8(panel + 8 * i);
      high[i] = wasm_i32x4_add(high[i], wasm_i32x4_dot_i16x8(w, x_high));
      low[i] = wasm_i32x4_add(low[i], wasm_i32x4_dot_i16x8(w, x_low));
    }
  }
  for (int i = 0; i < VECTORS; i++) {
    const v128_t sum = wasm_f32x4_add(
        wasm_f32x4_mul(wasm_f32x4_convert_i32x4(high[i]), wasm_f32x4_splat(1 << BITS)),
        wasm_f32x4_convert_i32x4(low[i]));
    wasm_v128_store(y + 4 * i, wasm_f32x4_mul(sum, wasm_f32x4_splat(x->step)));
  }
}

/* y (T, PANEL) = x (T, K) times a panel */
static void multiply_rows(float y[][PANEL], const input_t *x, int T, const weight_t *panel, int K) {
  for (int t = 0; t < T; t++) multiply(y[t], &x[t], panel, K);
}
