/* One AdamW step on a weight p of n elements whose moments are bytes, in blocks of 256 that share a
 * largest magnitude (arXiv:2110.02861), in place: m with a sign, v without. blockwise.py has the map
 * between bytes and numbers. */
#include "pool.h"
#include "vector.h"
#include "adamw.h"

#define BLOCK 256
#define DECADES 7

typedef unsigned char byte;

typedef struct {
  float values[256];                                    /* of each code */
  float n[DECADES], unit[DECADES], least[DECADES], whole;
} map_t;

typedef struct {
  float* p;
  byte *m, *v;
  float *m_tops, *v_tops;
  const float* grad;
  const adamw_options_t* options;
  const map_t *with_sign, *without;
  long n, blocks, tasks;
} adamw8bit_t;

HOT void make_map(map_t* map, int with_sign) {
  double below = 0, unit = 1e-6;
  map->values[0] = 0.f;
  for (int i = 0, n = with_sign ? 1 : 2; i < DECADES; i++, n *= 2, unit *= 10) {
    map->n[i] = n, map->unit[i] = (float)unit;
    map->least[i] = (float)((below + unit * (0.1 + 0.45 / n)) / 2);
    for (int j = 0; j < n; j++) {
      map->values[n + j] = (float)(unit * (0.1 + 0.9 * (j + 0.5) / n));
      if (with_sign) map->values[128 + n + j] = -map->values[n + j];
    }
    below = unit * (1 - 0.45 / n);
  }
  if (!with_sign) map->least[0] = 1e-45f;               /* only zero becomes zero */
  map->values[with_sign ? 128 : 1] = 1.f;
  map->whole = (float)((1 + below) / 2);                        /* larger ones are nearest to 1 */
}

HOT void dequantize(float* x, const byte* codes, float top, const map_t* map, long n) {
  for (long i = 0; i < n; i++) x[i] = map->values[codes[i]] * top;
}

HOT float quantize(byte* codes, const float* x, const map_t* map, int with_sign, long n) {
  float top = 0.f;
  for (long i = 0; i < n; i++) top = MAX(top, __builtin_fabsf(x[i]));
  const float by = top > 0.f ? top : 1.f;
  for (long i = 0; i < n; i++) {
    const float y = __builtin_fabsf(x[i]) / by;
    float size = 0.f, unit = 1.f;
    UNROLL for (int d = 0; d < DECADES; d++) {
      size = y >= map->least[d] ? map->n[d] : size;
      unit = y >= map->least[d] ? map->unit[d] : unit;
    }
    const float j = (float)(int)((y / unit - 0.1f) / 0.9f * size);
    int code = (int)(size + MAX(0.f, MIN(j, size - 1.f)));
    code = size > 0.f ? code : 0;
    if (with_sign) {
      code = x[i] < 0.f && code > 0 ? code + 128 : code;
      code = x[i] > 0.f && y > map->whole ? 128 : code;
    } else {
      code = y > map->whole ? 1 : code;
    }
    codes[i] = (byte)code;
  }
  return top;
}

static void some_blocks(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  map_t with_sign, without;
  adamw8bit_t g = {.p = p, .m = m, .v = v, .m_tops = m_tops, .v_tops = v_tops, .grad = grad,
                   .options = (const adamw_options_t*)options, .with_sign = &with_sign,
                   .without = &without, .n = n};
  if (g.options->apply == 0.f) return;
  make_map(&with_sign, 1);
  make_map(&without, 0);
  g.blocks = (n + BLOCK - 1) / BLOCK;
  g.tasks = MAX(1, MIN(4 * (long)shared->pool->threads, g.blocks / 16));
  parallel_for(shared->pool, some_blocks, &g, g.tasks);
}

KERNEL static void some_blocks(void* args, int index) {
  const adamw8bit_t* g = args;
  for (long b = g->blocks * index / g->tasks; b < g->blocks * (index + 1) / g->tasks; b++) {
    const long i = b * BLOCK, n = MIN(BLOCK, g->n - i);
    float m[BLOCK], v[BLOCK];
    dequantize(m, g->m + i, g->m_tops[b], g->with_sign, n);
    dequantize(v, g->v + i, g->v_tops[b], g->without, n);
    adamw_step(g->p + i, m, v, g->grad + i, g->options, n);
    g->m_tops[b] = quantize(g->m + i, m, g->with_sign, 1, n);
    g->v_tops[b] = quantize(g->v + i, v, g->without, 0, n);
  }
}
