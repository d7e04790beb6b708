/* ---- Functions of float32 numbers, without branches, so that loops over them become vector code.
 * Those of libm are slower, and there is no libm in a browser. */

typedef union { float number; uint32_t bits; } word_t;

static inline uint32_t bits_of(float x) { return (word_t){.number = x}.bits; }

static inline float of_bits(uint32_t bits) { return (word_t){.bits = bits}.number; }

/* 2^x to 2e-7 of its value, for x in [-126, 126]; x outside counts as the nearer end */
static inline float power_of_2(float x) {
  x = x < -126.f ? -126.f : x;
  x = x > 126.f ? 126.f : x;
  const float shifted = x + 12582912.f;   /* 1.5 * 2^23: rounds x to an integer */
  const float r = x - (shifted - 12582912.f);
  float p = 1.5403530e-4f * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  return of_bits(bits_of(p) + (bits_of(shifted) << 23));
}

static inline float exponential(float x) { return power_of_2(x * 1.44269504f); }

/* the natural logarithm of a positive normal number: 2 artanh((m-1)/(m+1)) of its mantissa m */
static inline float logarithm(float x) {
  const int32_t exponent = (int32_t)(bits_of(x) - 0x3f3504f3u) >> 23;
  const float m = of_bits(bits_of(x) - ((uint32_t)exponent << 23)) - 1.f;
  const float s = m / (m + 2.f), z = s * s;
  float p = 0.2222222f * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.f;
  return s * p + (float)exponent * 0.69314718f;
}

static inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

/* x times the normal distribution function; erf by Abramowitz and Stegun 7.1.26, to 1.5e-7 */
static inline float gelu(float x) {
  const float z = (x < 0.f ? -x : x) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * z);
  float p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float half = 0.5f * (1.f - t * p * exponential(-z * z));
  return x * (0.5f + (x < 0.f ? -half : half));
}

/* GPT-2's approximation: (1 + tanh(z)) / 2 is the sigmoid of 2 z */
static inline float gelu_tanh(float x) {
  return x * sigmoid(1.5957691f * x * (1.f + 0.044715f * x * x));
}

/* Sums and maxima are taken of PARTS interleaved parts, so that these loops become vector code. */
enum { PARTS = 8 };

/* the sum of x[i] * y[i], of n numbers */
static float dot(const float *x, const float *y, int n) {
  float part[PARTS] = {0}, sum = 0.f;
  const int whole = n - n % PARTS;
  for (int i = 0; i < whole; i += PARTS)
    for (int j = 0; j < PARTS; j++) part[j] += x[i + j] * y[i + j];
  for (int i = whole; i < n; i++) sum += x[i] * y[i];
  for (int j = 0; j < PARTS; j++) sum += part[j];
  return sum;
}

static float sum_of(const float *x, int n) {
  float part[PARTS] = {0}, sum = 0.f;
  const int whole = n - n % PARTS;
  for (int i = 0; i < whole; i += PARTS)
    for (int j = 0; j < PARTS; j++) part[j] += x[i + j];
  for (int i = whole; i < n; i++) sum += x[i];
  for (int j = 0; j < PARTS; j++) sum += part[j];
  return sum;
}

static float largest(const float *x, int n) {
  float part[PARTS], top = x[0];
  const int whole = n - n % PARTS;
  for (int j = 0; j < PARTS; j++) part[j] = top;
  for (int i = 0; i < whole; i += PARTS)
    for (int j = 0; j < PARTS; j++) part[j] = x[i + j] > part[j] ? x[i + j] : part[j];
  for (int i = whole; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int j = 0; j < PARTS; j++) top = part[j] > top ? part[j] : top;
  return top;
}

/* y = the probabilities that are proportional to exp(x), of n numbers; y may be x */
static void softmax(float *y, const float *x, int n) {
  const float top = largest(x, n);
  for (int i = 0; i < n; i++) y[i] = exponential(x[i] - top);
  const float sum = sum_of(y, n);
  for (int i = 0; i < n; i++) y[i] /= sum;
}
