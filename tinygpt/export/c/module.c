/* ---- The WebAssembly module: what a page calls, and the memory that it reads and writes. */

#define EXPORT(name) __attribute__((export_name(#name)))

char weights_image[WEIGHTS_BYTES] __attribute__((aligned(64)));
int32_t tokens[CHUNK], token;
float probabilities[KNOWN_IDS];

static void follow(const int32_t *tokens, int T, int p) {
  if (!unread) take_model(weights_image);
  read_tokens(tokens, T, p);
}

EXPORT(prefill) void prefill(int start_pos, int row) { follow(tokens, row + 1, start_pos); }

EXPORT(step) void step(int start_pos) { follow(&token, 1, start_pos); }

EXPORT(sample) int32_t draw(uint32_t key) {
  softmax(probabilities, logits, KNOWN_IDS);
  return sample(key);
}

EXPORT(make_key) uint32_t make_key(uint32_t seed, uint32_t length) { return key_of(seed, length); }
