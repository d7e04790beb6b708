/* Rotary positions (arXiv:2104.09864): each pair (x[i], x[i + D/2]) of row t turned by an angle
 * whose cosine and sine stand in row t of cos and sin (T x D/2). BACKWARD 1 turns back, which is
 * the gradient. x may be stored (B, H, T, D) or (B, T, H, D); out is stored alike. */
#include "pool.h"
#include "vector.h"

typedef x_t act;

typedef struct {
  const act* x;
  const float *cos, *sin;
  act* out;
  long H, T, D;
  long batch, head, row;        /* strides */
} rope_t;

static void one_head(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  rope_t g = {.x = x, .cos = cos, .sin = sin, .out = out, .H = H, .T = T, .D = D,
              .batch = batch, .head = head, .row = row};
  parallel_for_work(shared->pool, one_head, &g, B * H, 2 * B * H * T * D);
}

KERNEL static void one_head(void* args, int index) {
  const rope_t* g = args;
  const long half = g->D / 2, at = index / g->H * g->batch + index % g->H * g->head;
  for (long t = 0; t < g->T; t++) {
    const act *a = g->x + at + t * g->row, *b = a + half;
    const float *cos = g->cos + t * half, *sin = g->sin + t * half;
    act *y = g->out + at + t * g->row, *z = y + half;
    for (long i = 0; i < half; i++) {
      const float s = BACKWARD ? -sin[i] : sin[i], left = GET(a + i), right = GET(b + i);
      PUT(y + i, left * cos[i] - right * s);
      PUT(z + i, right * cos[i] + left * s);
    }
  }
}
