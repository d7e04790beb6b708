/* token (B) = the index of the largest of each row of logits (B x V), the first one of equals.
 * With a temperature the logits are divided by it; with a key they gain Gumbel noise, that of
 * kernels/random.py, and the token is drawn from their softmax. Rows share a key where
 * key_stride is 0, and have one each where it is 1. */
#include "pool.h"
#include "vector.h"

#define SHARE 8192   /* logits of a task */

typedef struct { float value; int index; } best_t;

typedef struct {
  const float* logits;
  best_t* best;
  float temperature;
  const unsigned* key;
  long V, chunks, key_stride;
} draw_t;

static void some_logits(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  const float* divisor = temperature;
  draw_t g = {.logits = logits, .best = shared->workspace, .V = V, .key = key,
              .temperature = divisor ? divisor[0] : 1.f, .key_stride = key_stride,
              .chunks = (V + SHARE - 1) / SHARE};
  parallel_for(shared->pool, some_logits, &g, B * g.chunks);
  for (long b = 0; b < B; b++) {
    best_t best = g.best[b * g.chunks];
    for (long i = b * g.chunks + 1; i < (b + 1) * g.chunks; i++)
      if (g.best[i].value > best.value) best = g.best[i];
    token[b] = best.index;
  }
}

/* natural logarithm of positive normal numbers, as by slog2 in vector.h */
HOT vfloat vlog(vfloat x) {
  const vint exponent = ((vint)x - 0x3f3504f3) >> 23;
  const vfloat m = (vfloat)((vint)x - (exponent << 23)) - 1.0f;
  const vfloat s = m / (m + 2.0f), z = s * s;
  vfloat p = 0.2222222f * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.0f;
  return s * p + __builtin_convertvector(exponent, vfloat) * LN2;
}

HOT vfloat gumbel(vuint index, unsigned key) {
  const vfloat high = __builtin_convertvector((vint)(random_bits(index, key) >> 9), vfloat);
  return -vlog(-vlog((high + 0.5f) * 0x1p-23f));
}

KERNEL static void some_logits(void* args, int task) {
  const draw_t* g = args;
  const long b = task / g->chunks, first = task % g->chunks * SHARE;
  const long last = MIN(first + SHARE, g->V);
  const vint iota = IOTA;
  const float* row = g->logits + b * g->V;
  vfloat top = (vfloat)(-__builtin_inff());
  vint at = iota + (int)first;
  for (long v = first; v < last; v += LANES) {
    vfloat x = (vfloat)(-__builtin_inff());
    if (v + LANES <= last)
      x = LOAD(row + v);
    else
      for (long i = v; i < last; i++) x[i - v] = row[i];
    x = x / g->temperature;
    if (g->key) x += gumbel((vuint)iota + (unsigned)(b * g->V + v), g->key[b * g->key_stride]);
    const vint better = x > top;
    top = select(better, x, top);
    at = (better & (iota + (int)v)) | (~better & at);
  }
  best_t best = {top[0], at[0]};
  for (int i = 1; i < LANES; i++)
    if (top[i] > best.value || (top[i] == best.value && at[i] < best.index))
      best = (best_t){top[i], at[i]};
  g->best[task] = best;
}
