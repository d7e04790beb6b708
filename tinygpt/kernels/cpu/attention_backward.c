/* Causal flash attention, backward. With P the weights, recomputed tile by tile from lse, Z their
 * dropout factors, and delta the sum over D of dout * out:
 *   dV = (P Z)^T dout,  dS = P (Z (dout V^T) - delta),  dK = dS^T Q / sqrt(D),  dQ = dS K / sqrt(D)
 * A task takes one kv head and walks its tiles of keys, adding to dq as it goes, in float32. Where
 * there are fewer kv heads than threads, a task takes one tile of keys for dk and dv alone, and a
 * second round of tasks, one tile of queries each, computes dq. */
#include "attention.h"

static void head_task(void* args, int index);
static void key_task(void* args, int index);
static void query_task(void* args, int index);
static void delta_task(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  pool_t* pool = shared->pool;
  attention_t a = {.q = q, .k = k ? k : q, .v = v ? v : q, .dout = dout, .out = (act*)out,
                   .lse = (float*)lse, .delta = delta, .dq = dq, .dk = dk ? dk : dq,
                   .dv = dv ? dv : dq, .sums = sums, .ss = {0, H * T * D, T * D, D}, SIZES};
  if (!sums) {
    a.sums = (float*)dq;
    a.ss = a.qs;
  }
  parallel_for(pool, delta_task, &a, B * H);
  if (B * G >= (long)pool->threads) {
    parallel_for(pool, head_task, &a, B * G);
  } else {
    parallel_for(pool, key_task, &a, B * G * ((S + BK - 1) / BK));
    parallel_for(pool, query_task, &a, B * H * ((T + BQ - 1) / BQ));
  }
}

KERNEL static void delta_task(void* args, int head) {
  const attention_t* a = args;
  const long b = head / a->H, h = head % a->H;
  for (long i = 0; i < a->T; i++) {
    const act *x = AT(a->dout, a->os, b, h, i), *y = AT(a->out, a->os, b, h, i);
    vfloat sum = (vfloat)0.f;
    long d = 0;
    for (; d + LANES <= a->D; d += LANES) sum += LOAD(x + d) * LOAD(y + d);
    float s = vsum(sum);
    for (; d < a->D; d++) s += GET(x + d) * GET(y + d);
    a->delta[head * a->T + i] = s;
  }
}

typedef struct {
  step_t *kt, *vt, *keys;            /* of the keys: transposed (D x BK), deep (BK x DP) */
  step_t *q, *dout;                  /* of the queries: rows (BQ x DP) */
  step_t *deep_q, *deep_dout;        /* and deep ones */
  step_t *p, *ds, *rows_of_ds;       /* weights, after dropout, and their gradient (BQ x BK) */
  float *dk, *dv, *dq;               /* gradients (BK x DP), (BQ x DP) */
  int* first;                        /* of visible_keys */
} tiles_t;

/* steps of numbers are rows and deep at once */
#define TILES(a) \
  {.kt = TILE(STEPS((a)->D), BK), .vt = TILE(STEPS((a)->D), BK), .keys = TILE(BK / PER, (a)->DP), \
   .q = TILE(BQ, (a)->DP / PER), .dout = TILE(BQ, (a)->DP / PER), \
   .deep_q = PER > 1 ? TILE(BQ / PER, (a)->DP) : 0, \
   .deep_dout = PER > 1 ? TILE(BQ / PER, (a)->DP) : 0, \
   .p = TILE(BQ / PER, BK), .ds = TILE(BQ / PER, BK), \
   .rows_of_ds = PER > 1 ? TILE(BQ, BK / PER) : 0, \
   .dk = TILE(BK, (a)->DP), .dv = TILE(BK, (a)->DP), .dq = TILE(BQ, (a)->DP), .first = TILE(1, BQ)}

HOT void load_keys(const attention_t* a, tiles_t t, long b, long group, long j0, long nj) {
  const act *k = AT(a->k, a->ks, b, group, j0), *v = AT(a->v, a->vs, b, group, j0);
  load_transposed(t.kt, k, a->ks.row, nj, BK, a->D);
  load_transposed(t.vt, v, a->vs.row, nj, BK, a->D);
  load_deep(t.keys, k, a->ks.row, nj, a->D, a->DP);
}

HOT void load_queries(const attention_t* a, tiles_t t, long b, long h, long i0, long n) {
  const act *q = AT(a->q, a->qs, b, h, i0), *dout = AT(a->dout, a->os, b, h, i0);
  load_rows(t.q, q, a->qs.row, n, ROUND_UP(n, ROWS), a->D, a->DP);
  load_rows(t.dout, dout, a->os.row, n, ROUND_UP(n, ROWS), a->D, a->DP);
#if DOT
  load_deep(t.deep_q, q, a->qs.row, n, a->D, a->DP);
  load_deep(t.deep_dout, dout, a->os.row, n, a->D, a->DP);
#endif
}

/* PER rows from r on of LANES weights of keys from j on, after dropout, and of their gradients */
HOT void store_weights(tiles_t t, long r, long j, const vfloat p[PER], const vfloat ds[PER]) {
  store_steps(t.p + r / PER * BK + j, p);
  store_steps(t.ds + r / PER * BK + j, ds);
#if DOT
  UNROLL for (int u = 0; u < PER; u++) STORE((part_t*)t.rows_of_ds + (r + u) * BK + j, ds[u]);
#endif
}

/* p and ds of a block of ROWS queries and COLS keys, of scores and of the weights' gradients dp */
HOT void weigh_block(const attention_t* a, tiles_t t, visible_t seen, const float* scores,
                     const float* dps, long head, long i0, long i, long n, long j0, long j,
                     long nj, int masked) {
  const vint iota = IOTA;
  for (long r = i; r < i + ROWS; r += PER)
    for (long x = j; x < j + COLS; x += LANES) {
      vfloat kept[PER], ds[PER];
      UNROLL for (int u = 0; u < PER; u++) {
        const int real = r + u < n, at = (int)(a->offset + i0 + r + u);
        const long row = head * a->T + i0 + r + u, block = (r + u - i) * COLS + x - j;
        const float lse = real ? a->lse[row] : 0.f, delta = real ? a->delta[row] : 0.f;
        vfloat p = vexp2(LOAD(scores + block) * (a->scale * LOG2E) - lse);
        vfloat dp = LOAD(dps + block);
        if (masked || !real) {
          const vint key = iota + (int)(j0 + x), end = (vint)(int)(real ? j0 + nj : 0);
          p = select((key <= at) & (key >= seen.first[r + u]) & (key < end), p, (vfloat)0.f);
        }
        kept[u] = p;
        if (a->dropout) {
          const vfloat factor = dropout_factor(a, (u64)(row * a->S + j0 + x), 1);
          dp *= factor;
          kept[u] *= factor;
        }
        ds[u] = p * (dp - delta) * a->scale;
      }
      store_weights(t, r, x, kept, ds);
    }
}

/* p and ds of a tile of queries and keys */
HOT void weights(const attention_t* a, tiles_t t, visible_t seen, long head, long i0, long n,
                 long j0, long nj) {
  const int masked = !all_visible(a, seen, i0, j0, nj) || nj < BK;
  const long row = a->DP / PER;
  float scores[ROWS * COLS], dps[ROWS * COLS];
  for (long i = 0; i < n; i += ROWS)
    for (long j = 0; j < nj; j += COLS) {
      if (j0 + j > a->offset + i0 + i + ROWS - 1) {
        const vfloat zeros[PER] = {};
        for (long r = i; r < i + ROWS; r += PER)
          for (long x = j; x < j + COLS; x += LANES) store_weights(t, r, x, zeros, zeros);
        continue;
      }
      micro_kernel(t.q + i * row, row, 1, t.kt + j, BK, scores, COLS, 0, STEPS(a->D), 0);
      micro_kernel(t.dout + i * row, row, 1, t.vt + j, BK, dps, COLS, 0, STEPS(a->D), 0);
      weigh_block(a, t, seen, scores, dps, head, i0, i, n, j0, j, nj, masked);
    }
}

/* dv += p^T dout, dk += ds^T q */
HOT void add_key_gradients(const attention_t* a, tiles_t t, long i0, long n, long j0, long nj) {
  const step_t *q = PER > 1 ? t.deep_q : t.q, *dout = PER > 1 ? t.deep_dout : t.dout;
  for (long j = 0; j < nj; j += ROWS) {
    const long from = MAX(0, j0 + j - a->offset - i0) / PER;   /* no query before it sees a key */
    for (long d = 0; d < a->DP; d += COLS) {
      micro_kernel(t.p + j, 1, BK, dout + d, a->DP, t.dv + j * a->DP + d, a->DP, from, STEPS(n), 1);
      micro_kernel(t.ds + j, 1, BK, q + d, a->DP, t.dk + j * a->DP + d, a->DP, from, STEPS(n), 1);
    }
  }
}

/* dq += ds k, dq (n x DP) with row stride ld */
HOT void add_query_gradients(const attention_t* a, tiles_t t, float* dq, long ld, long i0, long n,
                             long j0, long nj) {
  const step_t* ds = PER > 1 ? t.rows_of_ds : t.ds;
  for (long i = 0; i < n; i += ROWS) {
    const long count = MIN(nj, a->offset + i0 + i + ROWS - j0);
    if (count <= 0) continue;
    for (long d = 0; d < a->DP; d += COLS)
      micro_kernel(ds + i * BK / PER, BK / PER, 1, t.keys + d, a->DP, dq + i * ld + d, ld, 0,
                   STEPS(count), 1);
  }
}

/* The gradients of one tile of keys; with_queries also adds its part of dq, which is zero where no
 * earlier tile has added to it. */
HOT void key_tile(const attention_t* a, tiles_t t, long b, long group, long j0, int with_queries) {
  const long per_group = a->H / a->G, nj = MIN(a->S - j0, BK);
  load_keys(a, t, b, group, j0, nj);
  fill(t.dk, BK * a->DP, 0.f);
  fill(t.dv, BK * a->DP, 0.f);
  const long lowest = MAX(0, j0 - a->offset) / BQ * BQ;
  for (long h = group * per_group; h < (group + 1) * per_group; h++)
    for (long i0 = lowest; i0 < a->T; i0 += BQ) {
      const long n = MIN(a->T - i0, BQ);
      const visible_t seen = visible_keys(a, t.first, b, i0, n);
      if (seen.least >= j0 + nj) continue;
      load_queries(a, t, b, h, i0, n);
      weights(a, t, seen, b * a->H + h, i0, n, j0, nj);
      add_key_gradients(a, t, i0, n, j0, nj);
      if (!with_queries) continue;
      float* dq = AT(a->sums, a->ss, b, h, i0);
      if (a->D == a->DP && n % ROWS == 0) {
        add_query_gradients(a, t, dq, a->ss.row, i0, n, j0, nj);
        continue;
      }
      load_floats(t.dq, dq, a->ss.row, n, ROUND_UP(n, ROWS), a->D, a->DP);
      add_query_gradients(a, t, t.dq, a->DP, i0, n, j0, nj);
      store_floats(dq, a->ss.row, t.dq, n, a->D, a->DP);
    }
  store_tile(AT(a->dk, a->ks, b, group, j0), a->ks.row, t.dk, nj, a->D, a->DP);
  store_tile(AT(a->dv, a->vs, b, group, j0), a->vs.row, t.dv, nj, a->D, a->DP);
}

KERNEL static void head_task(void* args, int index) {
  const attention_t* a = args;
  const long b = index / a->G, group = index % a->G, per_group = a->H / a->G;
  tiles_t t = TILES(a);
  for (long h = group * per_group; h < (group + 1) * per_group; h++)
    for (long i = 0; i < a->T; i++)
      for (long d = 0; d < a->D; d++) AT(a->sums, a->ss, b, h, i)[d] = 0.f;
  for (long j0 = 0; j0 < a->S; j0 += BK) key_tile(a, t, b, group, j0, 1);
  for (long h = group * per_group; sizeof(act) < sizeof(float) && h < (group + 1) * per_group; h++)
    store_tile(AT(a->dq, a->qs, b, h, 0), a->qs.row, AT(a->sums, a->ss, b, h, 0), a->T, a->D, a->D);
}

KERNEL static void key_task(void* args, int index) {
  const attention_t* a = args;
  const long tiles = (a->S + BK - 1) / BK, head = index / tiles;
  tiles_t t = TILES(a);
  key_tile(a, t, head / a->G, head % a->G, index % tiles * BK, 0);
}

KERNEL static void query_task(void* args, int index) {
  const attention_t* a = args;
  const long tiles = (a->T + BQ - 1) / BQ, head = index / tiles;
  const long b = head / a->H, h = head % a->H, group = h / (a->H / a->G);
  const long i0 = (tiles - 1 - index % tiles) * BQ, n = MIN(a->T - i0, BQ);
  tiles_t t = TILES(a);
  const visible_t seen = visible_keys(a, t.first, b, i0, n);
  load_queries(a, t, b, h, i0, n);
  fill(t.dq, BQ * a->DP, 0.f);
  for (long j0 = seen.least / BK * BK; j0 < seen.last; j0 += BK) {
    const long nj = MIN(seen.last - j0, BK);
    load_keys(a, t, b, group, j0, nj);
    weights(a, t, seen, head, i0, n, j0, nj);
    add_query_gradients(a, t, t.dq, a->DP, i0, n, j0, nj);
  }
  store_tile(AT(a->dq, a->qs, b, h, i0), a->qs.row, t.dq, n, a->D, a->DP);
}
