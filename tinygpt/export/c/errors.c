/* ---- Errors: one line, and exit status 2 */

static void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  fputs("error: ", stderr);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  va_end(values);
  exit(2);
}

static void *allocate(size_t bytes) {
  void *memory = malloc(bytes);
  if (!memory) fail("out of memory: %zu bytes cannot be had", bytes);
  return memory;
}
