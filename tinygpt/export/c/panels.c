/* ---- Weights in panels, (ceil(N / PANEL), K, PANEL): for each of K inputs the weights of PANEL
 * outputs, so that a loop over these becomes vector code. */

enum { PANEL = 32 };

typedef float input_t;

static size_t panel_size(int K) { return (size_t)K * PANEL; }

static inline float weight_of(const weight_t *panel, int k, int i) {
  return number(panel[(size_t)k * PANEL + i]);
}

/* x (T, K) as multiply_rows takes it */
static const input_t *prepare(const float *x, int T, int K) {
  (void)T, (void)K;
  return x;
}

/* y (PANEL) = x (K) times a panel */
VECTORIZED
static void multiply(float *restrict y, const input_t *restrict x, const weight_t *restrict panel,
                     int K) {
  float sum[PANEL] = {0};
  for (int k = 0; k < K; k++, panel += PANEL)
    for (int i = 0; i < PANEL; i++) sum[i] += x[k] * number(panel[i]);
  for (int i = 0; i < PANEL; i++) y[i] = sum[i];
}

/* y (K, PANEL) = a panel as floats */
VECTORIZED
static void unpack(float *restrict y, const weight_t *restrict panel, int K) {
  for (int i = 0; i < K * PANEL; i++) y[i] = number(panel[i]);
}

/* y0 and y1 (PANEL) = x0 and x1 (K) times a panel of floats (K, PANEL), 16 outputs at a time, so
 * that all sums fit into registers */
VECTORIZED
static void multiply_two(float *restrict y0, float *restrict y1, const float *restrict x0,
                         const float *restrict x1, const float *restrict panel, int K) {
  enum { STRIP = 16 };
  for (int first = 0; first < PANEL; first += STRIP) {
    float sum0[STRIP] = {0}, sum1[STRIP] = {0};
    for (int k = 0; k < K; k++)
      for (int i = 0; i < STRIP; i++) {
        sum0[i] += x0[k] * panel[k * PANEL + first + i];
        sum1[i] += x1[k] * panel[k * PANEL + first + i];
      }
    for (int i = 0; i < STRIP; i++) y0[first + i] = sum0[i];
    for (int i = 0; i < STRIP; i++) y1[first + i] = sum1[i];
  }
}

/* y (T, PANEL) = x (T, K) times a panel; of several tokens each weight is converted once */
static void multiply_rows(float y[][PANEL], const input_t *x, int T, const weight_t *panel, int K) {
  static float numbers[LONGEST * PANEL];   /* no K is larger than LONGEST */
  if (T > 1) unpack(numbers, panel, K);
  for (int t = 0; t + 1 < T; t += 2)
    multiply_two(y[t], y[t + 1], x + (size_t)t * K, x + (size_t)(t + 1) * K, numbers, K);
  if (T % 2) multiply(y[T - 1], x + (size_t)(T - 1) * K, panel, K);
}
