/* ---- Weights in panels, (ceil(N / PANEL), K, PANEL): for each of K inputs the weights of PANEL
 * outputs, so that a loop over these becomes vector code. */

enum { PANEL = 32 };

typedef float input_t;   /* K of them are what a panel is multiplied by */

static size_t panel_size(int K) { return (size_t)K * PANEL; }

static inline float weight_of(const weight_t *panel, int k, int i) {
  return number(panel[(size_t)k * PANEL + i]);
}

static const input_t *prepare(const float *x, int K) {
  (void)K;
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
