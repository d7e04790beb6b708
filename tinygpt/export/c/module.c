/* ---- The WebAssembly module: what a page calls, and the memory that it reads and writes. */

#define EXPORT(name) __attribute__((export_name(#name)))

enum { LISTED = KNOWN_IDS < 10 ? KNOWN_IDS : 10 };

char weights_image[WEIGHTS_BYTES] __attribute__((aligned(64)));
int32_t tokens[CHUNK], token;
float probabilities[KNOWN_IDS];
int32_t likeliest[LISTED];   /* the ids of the highest probabilities, in falling order */

static void follow(const int32_t *tokens, int T, int p) {
  if (!unread) take_model(weights_image);
  read_tokens(tokens, T, p);
}

EXPORT(prefill) void prefill(int start_pos, int row) { follow(tokens, row + 1, start_pos); }

EXPORT(step) void step(int start_pos) { follow(&token, 1, start_pos); }

EXPORT(predict) void predict(void) {
  softmax(probabilities, logits, KNOWN_IDS);
  int count = 0;
  for (int32_t id = 0; id < KNOWN_IDS; id++) {
    const float p = probabilities[id];
    if (count == LISTED && p <= probabilities[likeliest[LISTED - 1]]) continue;
    int at = count < LISTED ? count++ : LISTED - 1;
    for (; at > 0 && probabilities[likeliest[at - 1]] < p; at--) likeliest[at] = likeliest[at - 1];
    likeliest[at] = id;
  }
}

EXPORT(sample) int32_t draw(uint32_t key) {
  predict();
  return sample(key);
}

EXPORT(make_key) uint32_t make_key(uint32_t seed, uint32_t length) { return key_of(seed, length); }
