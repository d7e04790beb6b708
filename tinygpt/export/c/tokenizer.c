/* ---- The tokenizer: text to token ids and back. A token is a piece of UTF-8 text; with byte-level
 * BPE the text is split into words, and the bytes of each are merged. */

static struct {
  const uint32_t *ends;       /* (TOKENS) where in `bytes` a token ends; the next one begins there */
  const uint32_t *order;      /* (TOKENS) the ids, sorted by their bytes */
  const uint32_t *letters, *numbers, *spaces;   /* the first and last characters of ranges */
  const char *bytes;
} tokenizer;

static void take_tokenizer(void) {
  tokenizer.ends = take(TOKENS * sizeof(uint32_t));
  tokenizer.order = take(TOKENS * sizeof(uint32_t));
  tokenizer.letters = take(LETTERS * 2 * sizeof(uint32_t));
  tokenizer.numbers = take(NUMBERS * 2 * sizeof(uint32_t));
  tokenizer.spaces = take(SPACES * 2 * sizeof(uint32_t));
  tokenizer.bytes = take(tokenizer.ends[TOKENS - 1]);
}

static const char *bytes_of(int id, int *length) {
  const uint32_t begin = id ? tokenizer.ends[id - 1] : 0;
  *length = (int)(tokenizer.ends[id] - begin);
  return tokenizer.bytes + begin;
}

/* the id of the token with these bytes, or -1 */
static int find(const char *bytes, int length) {
  int low = 0, high = TOKENS;
  while (low < high) {
    const int middle = (low + high) / 2, id = (int)tokenizer.order[middle];
    int size;
    const char *token = bytes_of(id, &size);
    int order = memcmp(token, bytes, size < length ? size : length);
    if (!order) order = size - length;
    if (!order) return id;
    if (order < 0) low = middle + 1; else high = middle;
  }
  return -1;
}

/* ---- characters of UTF-8 */

static int length_of(const char *at) {
  const unsigned char first = (unsigned char)*at;
  return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

static uint32_t code_point(const char *at) {
  const int length = length_of(at);
  uint32_t point = (unsigned char)*at & (length == 1 ? 0x7f : 0x7f >> length);
  for (int i = 1; i < length; i++) point = point << 6 | ((unsigned char)at[i] & 0x3f);
  return point;
}

/* the bytes of a character that is not complete, and which byte may be next */
struct partial { char bytes[4]; int have, need; unsigned char low, high; };

/* Adds a byte; returns 1 if the character is complete with it, 0 if not, and -1 if it cannot follow
 * what is there, which is dropped then, or cannot begin a character. */
static int add_byte(struct partial *c, unsigned char byte) {
  if (c->have ? byte < c->low || byte > c->high : byte > 0xf4 || (byte > 0x7f && byte < 0xc2)) {
    c->have = 0;
    return -1;
  }
  if (!c->have) c->need = length_of((const char *)&byte);
  c->low = !c->have && byte == 0xe0 ? 0xa0 : !c->have && byte == 0xf0 ? 0x90 : 0x80;
  c->high = !c->have && byte == 0xed ? 0x9f : !c->have && byte == 0xf4 ? 0x8f : 0xbf;
  c->bytes[c->have++] = (char)byte;
  if (c->have < c->need) return 0;
  c->have = 0;
  return 1;
}

static int is_utf8(const char *text) {
  struct partial c = {0};
  for (; *text; text++)
    if (add_byte(&c, (unsigned char)*text) < 0) return 0;
  return !c.have;
}

/* ---- words, as GPT-2 splits them:
 * '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */

enum { SPACE, LETTER, NUMBER, OTHER };

static int is_in(uint32_t point, const uint32_t *ranges, int count) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ranges[2 * middle + 1] < point) low = middle + 1; else high = middle;
  }
  return low < count && ranges[2 * low] <= point;
}

static int kind_of(const char *at) {
  const uint32_t point = code_point(at);
  return is_in(point, tokenizer.letters, LETTERS) ? LETTER
       : is_in(point, tokenizer.numbers, NUMBERS) ? NUMBER
       : is_in(point, tokenizer.spaces, SPACES) ? SPACE : OTHER;
}

/* the end of the word that begins a text, which is not empty */
static const char *end_of_word(const char *text) {
  static const char *const endings[] = {"'s", "'d", "'m", "'t", "'ll", "'ve", "'re"};
  for (int i = 0; i < 7; i++)
    if (!strncmp(text, endings[i], strlen(endings[i]))) return text + strlen(endings[i]);
  const char *at = text, *last = text;
  if (*at == ' ' && at[1] && kind_of(at + 1) != SPACE) at++;
  const int kind = kind_of(at);
  for (; *at && kind_of(at) == kind; at += length_of(at)) last = at;
  /* of several blanks before a word the last one is the word's */
  return kind == SPACE && *at && last > text ? last : at;
}

/* Writes the ids of a word, at most `length`, and returns their number: again and again the two
 * neighbours are merged that make the token with the lowest id. */
static int encode_word(const char *word, int length, int32_t *ids) {
  if ((ids[0] = find(word, length)) >= 0) return 1;
  int *starts = allocate(2 * (size_t)(length + 1) * sizeof *starts);
  int *merged = starts + length + 1;   /* the id of a part and the one after it, or -1 */
  int parts = length;
  for (int i = 0; i <= length; i++) starts[i] = i;
  for (int i = 0; i + 1 < length; i++) merged[i] = find(word + i, 2);
  for (;;) {
    int best = -1;
    for (int i = 0; i + 1 < parts; i++)
      if (merged[i] >= 0 && (best < 0 || merged[i] < merged[best])) best = i;
    if (best < 0) break;
    parts--;
    memmove(starts + best + 1, starts + best + 2, (size_t)(parts - best) * sizeof *starts);
    memmove(merged + best, merged + best + 1, (size_t)(parts - best) * sizeof *merged);
    for (int i = best ? best - 1 : 0; i <= best && i + 1 < parts; i++)
      merged[i] = find(word + starts[i], starts[i + 2] - starts[i]);
  }
  for (int i = 0; i < parts; i++) ids[i] = find(word + starts[i], starts[i + 1] - starts[i]);
  free(starts);
  return parts;
}

/* Writes the ids of a text of UTF-8, at most one for a byte, and returns their number. */
static int encode(const char *text, int32_t *ids) {
  int count = 0;
  for (const char *at = text, *end; *at; at = end) {
    end = BPE ? end_of_word(at) : CHARACTERS ? at + length_of(at) : at + 1;
    if (BPE)
      count += encode_word(at, (int)(end - at), ids + count);
    else if ((ids[count++] = find(at, (int)(end - at))) < 0)
      fail("the tokenizer has only the characters of its training text; it lacks '%.*s'",
           (int)(end - at), at);
  }
  return count;
}
