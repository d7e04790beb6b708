/* ---- The command */

/* Writes up to `wanted` tokens after a text of `count` ids, which have room for both; returns how
 * many. */
static int generate(int32_t *ids, int count, int wanted) {
  const int given = (int)value_of("window_hop"), moves = given ? given : (BLOCK_SIZE + 1) / 2;
  const int hop = moves < BLOCK_SIZE ? moves : BLOCK_SIZE;
  int n = count < BLOCK_SIZE ? count : BLOCK_SIZE, cached = 0;   /* tokens of the window */
  int32_t *window = ids + count - n;
  int new = 0;
  begin_output();
  for (; new < wanted && !output.is_stopped; new++) {
    if (n > BLOCK_SIZE) {   /* the window moves, and with it all positions */
      window += hop;
      n -= hop;
      cached = 0;
    }
    for (int T; cached < n; cached += T) {
      T = n - cached < CHUNK ? n - cached : CHUNK;
      read_tokens(window + cached, T, cached);
    }
    const int32_t token = sample(key_of((uint64_t)value_of("seed"), (uint32_t)(count + new)));
    if (token == END_OF_TEXT) break;
    int length;
    const char *bytes = bytes_of(token, &length);
    put_bytes(bytes, length);
    window[n++] = token;
  }
  end_output();
  return new;
}

static double now(void) {
  struct timespec t;
  timespec_get(&t, TIME_UTC);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static char *read_file(const char *path, size_t size) {
  FILE *file = fopen(path, "rb");
  if (!file) fail("%s cannot be read: put it into the folder of the program", path);
  char *data = allocate(size + 1);
  if (fread(data, 1, size + 1, file) != size)
    fail("%s does not belong to this program: export the model again", path);
  fclose(file);
  return data;
}

/* the path of a file in the folder of the program */
static char *beside(const char *program, const char *name) {
  const char *slash = strrchr(program, '/');
  const size_t folder = slash ? (size_t)(slash + 1 - program) : 0;
  char *path = allocate(folder + strlen(name) + 1);
  memcpy(path, program, folder);
  strcpy(path + folder, name);
  return path;
}

int main(int argc, char **argv) {
  const char *prompt = parse(argc, argv);
  if (!is_utf8(prompt)) fail("the prompt is not text in UTF-8");
  char *path = beside(argv[0], FILE_NAME), *file = read_file(path, FILE_SIZE);
  take_model(file);
  take_tokenizer();

  const int wanted = (int)value_of("max_new_tokens");
  int32_t *ids = allocate((strlen(prompt) + (size_t)wanted + 1) * sizeof *ids);
  const int count = encode(prompt, ids);
  if (!count) fail("the prompt is empty: give at least one character");
  for (int i = 0; i < count; i++) {
    if (ids[i] >= VOCAB_SIZE) fail("the model has no token %d of the prompt", ids[i]);
    if (ids[i] < KNOWN_IDS) seen[ids[i]] = 1;
  }
  parameters[TEMPERATURE] = (float)value_of("temperature");
  parameters[TOP_K] = (float)value_of("top_k");
  parameters[TOP_P] = (float)value_of("top_p");
  parameters[MIN_P] = (float)value_of("min_p");
  parameters[REPETITION_PENALTY] = (float)value_of("repetition_penalty");

  fputs(prompt, stdout);
  const double start = now();
  const int new = generate(ids, count, wanted);
  const double seconds = now() - start;
  fprintf(stderr, "%d tokens in %.2f s (%.1f tokens/s)\n", new, seconds, new / seconds);
  free(ids);
  free(file);
  free(path);
  return 0;
}
