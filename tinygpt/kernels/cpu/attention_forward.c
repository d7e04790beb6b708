/* Causal flash attention, forward: out (B, T, H, D), and for the backward pass the logarithm to
 * base 2 of each softmax's denominator, lse (B, H, T). Scores are kept transposed, S[j][i], so that
 * the lanes of a vector are queries and the softmax needs no reduction across lanes. Where there is a
 * cache (keys, values), k and v are new in it, and all of it is seen. */
#include "attention.h"

static void append_token(void* args, int index);
static void query_tile(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  attention_t a = {.q = q, .k = k ? k : q, .v = v ? v : q, .out = out, .lse = lse, SIZES};
#if CACHED
  append_t appended = APPENDED;
  parallel_for(shared->pool, append_token, &appended, B * T);
  a.k = keys, a.v = values;
  a.ks = a.vs = (strides_t){0, G * S * D, S * D, D};
#endif
  parallel_for(shared->pool, query_tile, &a, B * H * ((T + BQ - 1) / BQ));
}

KERNEL static void append_token(void* args, int index) { append(args, index); }

/* the running maximum m, the sum s of the weights, and the factor by which both shrink */
typedef struct { float *m, *s, *shrink; } softmax_t;

/* weights 2^(S scale - m) of nj keys for LANES queries from i on, of the scores S */
HOT void weigh(const attention_t* a, softmax_t sm, visible_t seen, float* scores, step_t* weights,
               long head, long i0, long i, long j0, long nj, int masked) {
  const vint iota = IOTA;
  const float factor = a->scale * LOG2E;
  const vint position = __builtin_elementwise_min(iota + (int)(a->offset + i0 + i),
                                                  (vint)(int)(seen.last - 1));
  const vint first = *(const vint*)(seen.first + i);
  /* no micro kernel that reads these queries' weights reads further */
  const long end = MIN(ROUND_UP(nj, PER),
                       ROUND_UP(a->offset + i0 + ROUND_UP(i + LANES, ROWS) - j0, PER));
  const vfloat before = LOAD(sm.m + i);
  vfloat top = (vfloat)(-__builtin_inff()), sum = (vfloat)0.f;
  for (long j = 0; j < end; j++) {
    vfloat x = LOAD(scores + j * BQ + i);
    if (masked) {
      const vint key = (vint)(int)(j0 + j);
      x = select((key <= position) & (key >= first), x, (vfloat)(-__builtin_inff()));
      STORE(scores + j * BQ + i, x);
    }
    top = vmax(top, x);
  }
  top = vmax(before, top * factor);
  for (long j = 0; j < end; j += PER) {
    vfloat p[PER];
    UNROLL for (int u = 0; u < PER; u++) {
      const vfloat x = LOAD(scores + (j + u) * BQ + i);
      p[u] = vexp2(x * factor - top);
      if (masked) p[u] = select(x == -__builtin_inff(), (vfloat)0.f, p[u]);
      sum += p[u];
      if (a->dropout)
        p[u] *= dropout_factor(a, (u64)((head * a->T + i0 + i) * a->S + j0 + j + u),
                               (unsigned)a->S);
    }
    store_steps(weights + j / PER * BQ + i, p);
  }
  const vfloat shrink = vexp2(before - top);
  STORE(sm.m + i, top);
  STORE(sm.s + i, LOAD(sm.s + i) * shrink + sum);
  STORE(sm.shrink + i, shrink);
}

KERNEL static void query_tile(void* args, int index) {
  const attention_t* a = args;
  const long tiles = (a->T + BQ - 1) / BQ, D = a->D, DP = a->DP;
  const long head = index / tiles, b = head / a->H, h = head % a->H, group = h / (a->H / a->G);
  const long i0 = (tiles - 1 - index % tiles) * BQ;     /* the longest rows first */
  const long n = MIN(a->T - i0, BQ), np = ROUND_UP(n, COLS);
  step_t *qt = TILE(STEPS(D), BQ), *keys = TILE(BK, DP / PER), *values = TILE(BK / PER, DP);
  float *scores = TILE(BK, BQ), *out = TILE(BQ, DP);
  step_t* weights = PER > 1 ? TILE(BK / PER, BQ) : (step_t*)scores;
  softmax_t sm = {TILE(1, BQ), TILE(1, BQ), TILE(1, BQ)};
  load_transposed(qt, AT(a->q, a->qs, b, h, i0), a->qs.row, n, BQ, D);
  fill(sm.m, BQ, -1e30f);
  fill(sm.s, BQ, 0.f);
  fill(out, ROUND_UP(n, ROWS) * DP, 0.f);
  const visible_t seen = visible_keys(a, TILE(1, BQ), b, i0, n);
  for (long j0 = seen.least / BK * BK; j0 < seen.last; j0 += BK) {
    const long nj = MIN(seen.last - j0, BK), rows = ROUND_UP(nj, ROWS);
    const int masked = !all_visible(a, seen, i0, j0, nj) || nj % PER;
    load_rows(keys, AT(a->k, a->ks, b, group, j0), a->ks.row, nj, rows, D, DP);
    load_deep(values, AT(a->v, a->vs, b, group, j0), a->vs.row, nj, D, DP);
    for (long j = 0; j < rows; j += ROWS) {
      /* columns of queries that end before key j0 + j see nothing of these rows */
      const long from = MAX(0, j0 + j - a->offset - i0) / COLS * COLS;
      for (long i = from; i < np; i += COLS)
        micro_kernel(keys + j * DP / PER, DP / PER, 1, qt + i, BQ, scores + j * BQ + i, BQ, 0,
                     STEPS(D), 0);
    }
    for (long i = 0; i < np; i += LANES)
      weigh(a, sm, seen, scores, weights, head, i0, i, j0, nj, masked);
    for (long i = 0; i < n; i++)
      if (sm.shrink[i] != 1.0f)
        for (long d = 0; d < DP; d += LANES)
          STORE(out + i * DP + d, LOAD(out + i * DP + d) * sm.shrink[i]);
    for (long i = 0; i < n; i += ROWS) {
      const long count = MIN(nj, a->offset + i0 + i + ROWS - j0);
      for (long d = 0; d < DP; d += COLS)
        micro_kernel(weights + i, 1, BQ, values + d, DP, out + i * DP + d, DP, 0, STEPS(count), 1);
    }
  }
  for (long i = 0; i < n; i++) {
    for (long d = 0; d < DP; d += LANES)
      STORE(out + i * DP + d, LOAD(out + i * DP + d) / sm.s[i]);
    a->lse[head * a->T + i0 + i] = sm.m[i] + slog2(sm.s[i]);
  }
  store_tile(AT(a->out, a->os, b, h, i0), a->os.row, out, n, D, DP);
}
