/* ---- Writing the text, up to a stop string */

enum { MOST_STOPS = 32 };

static struct {
  const char *stops[MOST_STOPS];
  int stop_count, is_stopped;
  struct partial character;
  char *held;         /* the end of the text, which may be the beginning of a stop string */
  size_t held_length;
} output;

static void add_stop(const char *stop) {
  if (output.stop_count == MOST_STOPS) fail("stop is given more than %d times", MOST_STOPS);
  if (!*stop || !is_utf8(stop)) fail("stop is empty, or not text in UTF-8");
  output.stops[output.stop_count++] = stop;
}

/* the length of the longest beginning of a stop string with which `text` ends */
static size_t overlap(const char *text, size_t length, const char *stop) {
  size_t n = strlen(stop) < length ? strlen(stop) : length;
  while (memcmp(text + length - n, stop, n)) n--;
  return n;
}

static void put_byte(char byte) {
  if (output.is_stopped) return;
  output.held[output.held_length++] = byte;
  size_t kept = 0, found = 0;   /* bytes that may begin a stop string, and those of a whole one */
  for (int i = 0; i < output.stop_count; i++) {
    const size_t n = overlap(output.held, output.held_length, output.stops[i]);
    if (n > kept) kept = n;
    if (n > found && !output.stops[i][n]) found = n;
  }
  output.is_stopped = found > 0;
  const size_t written = output.held_length - (found ? found : kept);
  fwrite(output.held, 1, written, stdout);
  output.held_length -= written;
  memmove(output.held, output.held + written, output.held_length);
}

static void put_text(const char *text) {
  while (*text) put_byte(*text++);
}

/* Writes the characters that are complete with these bytes, U+FFFD for what is no character. */
static void put_bytes(const char *bytes, int length) {
  struct partial *c = &output.character;
  for (int i = 0; i < length; i++) {
    const int began = c->have;
    const int complete = add_byte(c, (unsigned char)bytes[i]);
    for (int j = 0; complete > 0 && j < c->need; j++) put_byte(c->bytes[j]);
    if (complete < 0) put_text("\xef\xbf\xbd");
    if (complete < 0 && began) i--;   /* this byte may begin the next one */
  }
  fflush(stdout);
}

static void begin_output(void) {
  size_t longest = 0;
  for (int i = 0; i < output.stop_count; i++)
    if (strlen(output.stops[i]) > longest) longest = strlen(output.stops[i]);
  output.held = allocate(longest + 1);
}

/* Writes what was held back. */
static void end_output(void) {
  if (output.character.have) put_text("\xef\xbf\xbd");
  if (!output.is_stopped) fwrite(output.held, 1, output.held_length, stdout);
  putchar('\n');
  free(output.held);
}
