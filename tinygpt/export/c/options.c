/* ---- The options of the command: ./model "ROMEO:" --temperature 0.5 --seed=7 */

static struct option {
  const char *name;
  double value, low, high;
  int is_whole;
  const char *help;
} options[] = {OPTIONS};

enum { OPTION_COUNT = sizeof options / sizeof *options };

/* whether a word of the command names an option: with - or _, followed by = or nothing */
static int is_named(const char *word, const char *name) {
  while (*name && (*name == *word || (*name == '_' && *word == '-'))) name++, word++;
  return !*name && (!*word || *word == '=');
}

static struct option *option_of(const char *word) {
  for (int i = 0; i < OPTION_COUNT; i++)
    if (is_named(word, options[i].name)) return &options[i];
  fail("there is no option --%s: see --help", word);
  return 0;
}

static double value_of(const char *name) { return option_of(name)->value; }

static void set(struct option *o, const char *text) {
  char *end;
  o->value = strtod(text, &end);
  const int is_number = end > text && !*end && o->value >= o->low && o->value <= o->high;
  if (!is_number || (o->is_whole && o->value != (double)(int64_t)o->value))
    fail("%s=%s is out of range: choose a %snumber from %g to %.16g", o->name, text,
         o->is_whole ? "whole " : "", o->low, o->high);
}

static void print_help(const char *program) {
  printf("usage: %s [PROMPT] [--OPTION VALUE ...]\n\n", program);
  for (int i = 0; i < OPTION_COUNT; i++)
    printf("  --%-20s %s (%g)\n", options[i].name, options[i].help, options[i].value);
  printf("  --%-20s end before this string; may be given several times\n", "stop");
  exit(0);
}

/* Sets the options of a command line, and returns the prompt. */
static const char *parse(int argc, char **argv) {
  const char *prompt = 0;
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--help")) print_help(argv[0]);
    if (strncmp(argv[i], "--", 2)) {
      if (prompt) fail("there are two prompts: put one into quotes");
      prompt = argv[i];
      continue;
    }
    const char *name = argv[i] + 2, *given = strchr(name, '=');
    struct option *o = is_named(name, "stop") ? 0 : option_of(name);
    if (!given && i + 1 == argc) fail("--%s needs a value", name);
    const char *value = given ? given + 1 : argv[++i];
    if (o) set(o, value); else add_stop(value);
  }
  return prompt ? prompt : DEFAULT_PROMPT;
}
