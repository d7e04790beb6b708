/* Runs a captured decode step `steps` times, its kernels in order, without Python between them. The
 * tokens that a step draws are the input of the next one, which is one position further on. */
#include "pool.h"

typedef void (*kernel_fn)(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);

typedef struct {
  kernel_fn run;
  u64 arguments[15];   /* a kernel does not look at those that it does not have */
} call_t;

typedef struct {
  const call_t* calls;
  u64 count;
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
    for (u64 c = 0; c < step->count; c++) {
      const u64* a = step->calls[c].arguments;
      step->calls[c].run(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                         a[12], a[13], a[14]);
    }
    for (u64 r = 0; r < step->rows; r++) *out++ = step->tokens[r] = step->drawn[r];
    for (u64 p = 0; p < step->position_count; p++) ++*step->positions[p];
  }
}
