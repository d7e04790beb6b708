/* ---- Drawing the next token, as tinygpt/inference/sampling.py does:
 * repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw. */

enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, PARAMETERS };

/* temperature 0: the likeliest token; top_k, top_p and min_p 0 and a penalty of 1: off */
float parameters[PARAMETERS];
uint8_t seen[KNOWN_IDS];              /* 1 for a token that occurs in the text */
static float scores[KNOWN_IDS];       /* the logits while they are changed */
static float weights[KNOWN_IDS];

/* words that compare as the numbers do */
static inline uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_of(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Keeps the scores >= the largest threshold above which the weights sum to `target`, which is
 * found bit by bit; the rest become -infinity. Without weights each counts 1. */
static void keep_heaviest(const float *weights, float target) {
  uint32_t threshold = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    float sum = 0.f;
    for (int i = 0; i < KNOWN_IDS; i++)
      if (ordered_bits(scores[i]) >= (threshold | bit)) sum += weights ? weights[i] : 1.f;
    if (sum >= target) threshold |= bit;
  }
  for (int i = 0; i < KNOWN_IDS; i++)
    if (ordered_bits(scores[i]) < threshold) scores[i] = -__builtin_inff();
}

static void keep_min_p(float p) {
  const float least = largest(scores, KNOWN_IDS) + logarithm(p);
  for (int i = 0; i < KNOWN_IDS; i++)
    if (scores[i] < least) scores[i] = -__builtin_inff();
}

/* Wellons' lowbias32 */
static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/* noise that makes the index of the largest sum a draw from the softmax (the Gumbel-max trick) */
static inline float gumbel(uint32_t index, uint32_t key) {
  const float uniform = ((float)(int32_t)(mix(mix(index) + key) >> 9) + 0.5f) * 0x1p-23f;
  return -logarithm(-logarithm(uniform));
}

/* The next token, drawn from the logits by a key; it counts as seen from now on. */
int32_t sample(uint32_t key) {
  const float temperature = parameters[TEMPERATURE], penalty = parameters[REPETITION_PENALTY];
  const float divisor = temperature > 0.f ? temperature : 1.f;
  for (int i = 0; i < KNOWN_IDS; i++) {
    const float penalized = logits[i] > 0.f ? logits[i] / penalty : logits[i] * penalty;
    scores[i] = (seen[i] ? penalized : logits[i]) / divisor;
  }
  if (temperature > 0.f) {
    if (parameters[TOP_K] > 0.f) keep_heaviest(0, parameters[TOP_K]);
    if (parameters[TOP_P] > 0.f && parameters[TOP_P] < 1.f) {
      softmax(weights, scores, KNOWN_IDS);
      keep_heaviest(weights, parameters[TOP_P]);
    }
    if (parameters[MIN_P] > 0.f) keep_min_p(parameters[MIN_P]);
    for (int i = 0; i < KNOWN_IDS; i++) scores[i] += gumbel((uint32_t)i, key);
  }
  const float top = largest(scores, KNOWN_IDS);
  int32_t token = 0;
  while (scores[token] < top) token++;
  seen[token] = 1;
  return token;
}

static uint32_t hashed(uint32_t word, uint32_t *constant, uint32_t multiplier) {
  word ^= *constant;
  *constant *= multiplier;
  word *= *constant;
  return word ^ word >> 16;
}

/* The first word of numpy's SeedSequence((seed, length)): the key of the token that follows a text
 * of `length` tokens. */
static uint32_t key_of(uint64_t seed, uint32_t length) {
  const uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
  const uint32_t entropy[4] = {low, high ? high : length, high ? length : 0};
  uint32_t pool[4], constant = 0x43b0d7e5u;
  for (int i = 0; i < 4; i++) pool[i] = hashed(entropy[i], &constant, 0x931e8875u);
  for (int from = 0; from < 4; from++)
    for (int to = 0; to < 4; to++)
      if (from != to) {
        const uint32_t word = hashed(pool[from], &constant, 0x931e8875u);
        pool[to] = 0xca01f9ddu * pool[to] - 0x4973f715u * word;
        pool[to] ^= pool[to] >> 16;
      }
  constant = 0x8b51f9ddu;
  return hashed(pool[0], &constant, 0x58f38dedu);
}
