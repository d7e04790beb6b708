/* Attention of one new position: writes its key and value into the cache, (B, G, S, D) each, and
 * out (B, H, D) is the softmax-weighted sum of the values that its queries see. The keys and values
 * of a head are streamed once for all queries that share them. With start (B) row b does not see the
 * keys before start[b]. Where there are fewer heads than threads, their keys are split, and the
 * results of the parts are merged (arXiv:2311.01282). */
#include "pool.h"
#include "vector.h"

typedef q_t act;
#include "cache.h"

#define CHUNK 64   /* keys that are weighed at once */
#define LOCAL(n) ((float*)__builtin_alloca_with_align((n) * sizeof(float), 512))

typedef struct {
  const act* q;                /* queries of a batch row: q_batch apart, of a head q_head */
  act *keys, *values, *out;
  const int* start;            /* or 0: every row begins at 0 */
  float* parts;                /* D values, the maximum and the sum of each */
  long G, S, D, group, q_batch, q_head, first, last, splits;
} decode_t;

static void some_keys(void* args, int index);

/* merges the parts of head h into its output */
HOT void merge(const decode_t* a, long head) {
  const long D = a->D, width = D + 2;
  float *first = a->parts + head * a->splits * width, *part = first;
  float top = first[D];
  for (long i = 1; i < a->splits; i++) top = MAX(top, first[i * width + D]);
  for (long i = 0; i < a->splits; i++, part += width) {
    const float share = vexp2((vfloat)(part[D] - top))[0];
    part[D + 1] *= share;
    for (long d = 0; d < D; d++) part[d] *= share;
    for (long d = 0; i && d < D; d++) first[d] += part[d];
    if (i) first[D + 1] += part[D + 1];
  }
  for (long d = 0; d < D; d++) PUT(a->out + head * D + d, first[d] / first[D + 1]);
}

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  const long p = offset[0], T = 1;
  const append_t appended = APPENDED;
  const strides_t qs = *(const strides_t*)q_strides;
  decode_t a = {.q = q + qs.start, .keys = keys, .values = values, .out = out, .start = start,
                .parts = shared->workspace, .G = G, .S = S, .D = D, .group = H / G,
                .q_batch = qs.batch, .q_head = qs.head,
                .first = window ? MAX(0, p + 1 - window) : 0, .last = p + 1};
  for (long b = 0; b < B; b++) append(&appended, b);
  const long threads = (long)shared->pool->threads, chunks = (a.last - a.first + CHUNK - 1) / CHUNK;
  a.splits = MAX(1, MIN((threads + B * G - 1) / (B * G), chunks));
  parallel_for_work(shared->pool, some_keys, &a, B * G * a.splits,
                    2 * B * H * (a.last - a.first) * D);
  if (a.splits > 1)
    for (long head = 0; head < B * H; head++) merge(&a, head);
}

/* scores to base 2 of n keys, the rest of the chunk -inf; returns the largest */
HOT float score(const float* q, const act* keys, long n, long D, float* scores) {
  for (long j = 0; j < CHUNK; j += LANES) STORE(scores + j, (vfloat)(-__builtin_inff()));
  for (long j = 0; j < n; j++, keys += D) {
    vfloat sum[2] = {(vfloat)0.f, (vfloat)0.f};
    long d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES) {
      sum[0] += LOAD(q + d) * LOAD(keys + d);
      sum[1] += LOAD(q + d + LANES) * LOAD(keys + d + LANES);
    }
    for (; d + LANES <= D; d += LANES) sum[0] += LOAD(q + d) * LOAD(keys + d);
    float x = vsum(sum[0] + sum[1]);
    for (; d < D; d++) x += q[d] * GET(keys + d);
    scores[j] = x;
  }
  vfloat top = LOAD(scores);
  for (long j = LANES; j < CHUNK; j += LANES) top = vmax(top, LOAD(scores + j));
  return vmaximum(top);
}

/* out = out * shrink + n weighted values */
HOT void add_values(float* out, float shrink, const float* weights, const act* values, long n,
                    long D) {
  long d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) {
    vfloat sum[4];
    UNROLL for (int i = 0; i < 4; i++) sum[i] = LOAD(out + d + i * LANES) * shrink;
    for (long j = 0; j < n; j++)
      UNROLL for (int i = 0; i < 4; i++)
        sum[i] += weights[j] * LOAD(values + j * D + d + i * LANES);
    UNROLL for (int i = 0; i < 4; i++) STORE(out + d + i * LANES, sum[i]);
  }
  for (; d + LANES <= D; d += LANES) {
    vfloat sum = LOAD(out + d) * shrink;
    for (long j = 0; j < n; j++) sum += weights[j] * LOAD(values + j * D + d);
    STORE(out + d, sum);
  }
  for (; d < D; d++) {
    out[d] *= shrink;
    for (long j = 0; j < n; j++) out[d] += weights[j] * GET(values + j * D + d);
  }
}

KERNEL static void some_keys(void* args, int index) {
  const decode_t* a = args;
  const long D = a->D, split = index % a->splits, pair = index / a->splits;   /* of B and G */
  const long b = pair / a->G, h0 = pair % a->G * a->group;
  const long first = a->start ? MAX(a->first, MIN(a->start[b], a->last - 1)) : a->first;
  const long seen = a->last - first;   /* a part may have none of them */
  const long j0 = first + seen * split / a->splits, j1 = first + seen * (split + 1) / a->splits;
  const float scale = LOG2E / __builtin_sqrtf((float)D);
  float *q = LOCAL(a->group * D), *tops = LOCAL(a->group), *sums = LOCAL(a->group);
  float *weights = LOCAL(CHUNK), *out = LOCAL(a->group * D);
  for (long h = 0; h < a->group; h++) {
    const act* src = a->q + b * a->q_batch + (h0 + h) * a->q_head;
    tops[h] = -1e30f, sums[h] = 0.f;
    for (long d = 0; d < D; d++) q[h * D + d] = GET(src + d) * scale;
    for (long d = 0; d < D; d++) out[h * D + d] = 0.f;
  }
  for (long j = j0; j < j1; j += CHUNK) {
    const long n = MIN(CHUNK, j1 - j), at = (pair * a->S + j) * D;
    for (long h = 0; h < a->group; h++) {
      const float top = MAX(tops[h], score(q + h * D, a->keys + at, n, D, weights));
      const float shrink = vexp2((vfloat)(tops[h] - top))[0];
      vfloat sum = (vfloat)0.f;
      for (long i = 0; i < n; i += LANES) {
        const vfloat x = LOAD(weights + i), w = vexp2(x - top);
        STORE(weights + i, select(x == -__builtin_inff(), (vfloat)0.f, w));
        sum += LOAD(weights + i);
      }
      tops[h] = top;
      sums[h] = sums[h] * shrink + vsum(sum);
      add_values(out + h * D, shrink, weights, a->values + at, n, D);
    }
  }
  for (long h = 0; h < a->group; h++, out += D) {
    const long head = pair * a->group + h;
    if (a->splits > 1) {
      float* part = a->parts + (head * a->splits + split) * (D + 2);
      for (long d = 0; d < D; d++) part[d] = out[d];
      part[D] = tops[h], part[D + 1] = sums[h];
    } else {
      for (long d = 0; d < D; d++) PUT(a->out + head * D + d, out[d] / sums[h]);
    }
  }
}
