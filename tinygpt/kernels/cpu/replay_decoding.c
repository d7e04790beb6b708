/* Runs a captured decode step `steps` times. The tokens that a step draws are the input of the next
 * one, which is one position further on. */
#include "calls.h"

typedef struct {
  pool_t* pool;
  const call_t *calls, *end;
  u64* const* positions;   /* the arguments that are start_pos */
  u64 position_count;
  u32* tokens;             /* (rows), what a step reads */
  const u32* drawn;        /* (rows), what it draws */
  u64 rows;
  u32* key;                /* (key_size), what it draws with */
  u64 key_size;
} step_t;

/* with keys (steps, key_size); all that is drawn goes into out (steps, rows) */
void NAME(const step_t* step, u64 steps, const u32* keys, u32* out) {
  for (u64 i = 0; i < steps; i++) {
    for (u64 k = 0; k < step->key_size; k++) step->key[k] = *keys++;
    run_calls(step->pool, step->calls, step->end);
    for (u64 r = 0; r < step->rows; r++) *out++ = step->tokens[r] = step->drawn[r];
    for (u64 p = 0; p < step->position_count; p++) ++*step->positions[p];
  }
}

static void run_part(void* args, int index) { run_call(call_after(args, index)); }
