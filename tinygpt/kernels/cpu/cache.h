/* The way of new keys and values (B, G, T, D) into a cache (B, G, S, D), from position `offset` on */

typedef struct { long start, batch, head, row; } strides_t;   /* in elements; D is contiguous */
#define AT(p, s, b, h, i) ((p) + (s).start + (b) * (s).batch + (h) * (s).head + (i) * (s).row)

typedef struct {
  act *keys, *values;
  const act *k, *v;
  strides_t ks, vs;
  long B, G, T, S, D, offset;
} append_t;

#define APPENDED {.keys = keys, .values = values, .k = k, .v = v, .B = B, .G = G, .T = T, .S = S, \
                  .D = D, .ks = *(const strides_t*)k_strides, .vs = *(const strides_t*)v_strides, \
                  .offset = offset[0]}

/* token index % T of row index / T of the batch */
HOT void append(const append_t* c, long index) {
  const long b = index / c->T, t = index % c->T;
  for (long g = 0; g < c->G; g++) {
    const long at = ((b * c->G + g) * c->S + c->offset + t) * c->D;
    const act *k = AT(c->k, c->ks, b, g, t), *v = AT(c->v, c->vs, b, g, t);
    for (long d = 0; d < c->D; d++) c->keys[at + d] = k[d];
    for (long d = 0; d < c->D; d++) c->values[at + d] = v[d];
  }
}
