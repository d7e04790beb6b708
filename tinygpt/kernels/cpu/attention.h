/* What both directions of causal flash attention share (arXiv:2205.14135, 2307.08691).
 *
 * Queries stand at positions offset + i and see keys j <= offset + i, with a window only those
 * j > offset + i - window, with starts (B, starts_row) none before the start of the row or, where
 * starts_row is T, of the query; always their own. Tiles of BQ queries and BK keys are copied to
 * packed memory, D padded to DP with zeros, so that no micro kernel meets an edge.
 *
 * Products take steps of their depth, of a number each, or with DOT 1, for bfloat16 alone, of a
 * pair (dot_pairs.h). Sums and the softmax are float32. */
#include "pool.h"
#include "vector.h"

typedef q_t act;
#include "cache.h"
#if DOT
#include "dot_pairs.h"
typedef bf16 part_t;           /* of a step */
typedef int step_t;
#define PER 2                  /* numbers in a step */
#else
typedef float part_t;
typedef float step_t;
#define PER 1
#endif
#define STEPS(n) (((n) + PER - 1) / PER)

#if ROWS == 6
#define BQ 96                  /* multiples of ROWS and of COLS */
#define BK 96
#else
#define BQ 64
#define BK 64
#endif
#define TILE(rows, cols) \
  ((void*)__builtin_alloca_with_align((rows) * (cols) * sizeof(float), 512))

typedef struct {
  const act *q, *k, *v, *dout;
  act *out, *dq, *dk, *dv;
  float *lse, *delta, *sums;     /* sums: dq, of all tiles of keys, before it is rounded */
  const int* starts;             /* or 0 */
  strides_t qs, ks, vs, os, ss;
  long B, H, G, T, S, D, DP;
  long starts_row;
  long offset, window;           /* window 0: none */
  unsigned dropout, key;         /* dropout: its probability times 2^32 */
  float scale, keep;             /* 1 / sqrt(D), 1 / (1 - dropout) */
} attention_t;

/* The fields of an attention_t that both directions set, from the names at their entry */
#define SIZES \
  .B = B, .H = H, .G = G, .T = T, .S = S, .D = D, .DP = ROUND_UP(D, COLS), \
  .qs = *(const strides_t*)q_strides, .ks = *(const strides_t*)k_strides, \
  .vs = *(const strides_t*)v_strides, .os = {0, T * H * D, D, H * D}, \
  .offset = offset[0], .window = window, .starts = starts, .starts_row = starts_row, \
  .dropout = (unsigned)dropout, .key = key[0], \
  .scale = 1.0f / __builtin_sqrtf((float)D), \
  .keep = 1.0f / (1.0f - (float)(unsigned)dropout * 0x1p-32f)

/* of n queries from i0 on the first key that each may see, first[n], and the least and the greatest
 * of them; key `last` is the first that none of them sees */
typedef struct { int* first; long least, greatest, last; } visible_t;

HOT visible_t visible_keys(const attention_t* a, int* first, long b, long i0, long n) {
  visible_t seen = {first, a->S, 0, MIN(a->S, a->offset + i0 + n)};
  for (long i = i0; i < i0 + n; i++) {
    const long at = a->offset + i;
    long key = a->window ? MAX(0, at - a->window + 1) : 0;
    if (a->starts) key = MAX(key, a->starts[b * a->starts_row + (a->starts_row > 1 ? i : 0)]);
    key = MIN(key, at);
    first[i - i0] = (int)key;
    seen.least = MIN(seen.least, key);
    seen.greatest = MAX(seen.greatest, key);
  }
  for (long i = n; i < BQ; i++) first[i] = 0;
  return seen;
}

/* does every one of the queries from i0 on see every one of the keys? */
HOT int all_visible(const attention_t* a, visible_t seen, long i0, long j0, long nj) {
  return j0 + nj - 1 <= a->offset + i0 && j0 >= seen.greatest;
}

/* dst (rows x DP) = n rows of D, the rest zero */
HOT void load_floats(float* dst, const float* src, long stride, long n, long rows, long D,
                     long DP) {
  for (long r = 0; r < rows; r++) {
    long c = 0;
    if (r < n) {
      for (; c + LANES <= D; c += LANES) STORE(dst + r * DP + c, LOAD(src + r * stride + c));
      for (; c < D; c++) dst[r * DP + c] = src[r * stride + c];
    }
    for (; c < DP; c++) dst[r * DP + c] = 0.f;
  }
}
/* dst = n rows of D of src (rows x DP) */
#define DEFINE_STORE(kind, store_tile) \
  HOT void store_tile(kind* dst, long stride, const float* src, long n, long D, long DP) { \
    for (long r = 0; r < n; r++) { \
      long c = 0; \
      for (; c + LANES <= D; c += LANES) STORE(dst + r * stride + c, LOAD(src + r * DP + c)); \
      for (; c < D; c++) PUT(dst + r * stride + c, src[r * DP + c]); \
    } \
  }
DEFINE_STORE(act, store_tile)
DEFINE_STORE(float, store_floats)

#if DOT
#include "attention_pairs.h"
#else
#include "attention_float.h"
#endif

/* C (ROWS x COLS) = or += A B over steps k0 .. k1: A(i, k) = a[i * ai + k * ak], row k of B at
 * b + k * ldb */
HOT void micro_kernel(const step_t* a, long ai, long ak, const step_t* b, long ldb, float* c,
                      long ldc, long k0, long k1, int accumulate) {
  vfloat sum[ROWS][2];
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < 2; j++)
      sum[i][j] = accumulate ? LOAD(c + i * ldc + j * LANES) : (vfloat)0.f;
  for (long k = k0; k < k1; k++) {
    vsteps row[2];
    UNROLL for (int j = 0; j < 2; j++) row[j] = load_steps(b + k * ldb + j * LANES);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const vsteps x = (vsteps)a[i * ai + k * ak];
      UNROLL for (int j = 0; j < 2; j++) sum[i][j] = multiply_add(sum[i][j], x, row[j]);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < 2; j++) STORE(c + i * ldc + j * LANES, sum[i][j]);
}

HOT void fill(float* dst, long n, float x) {
  for (long i = 0; i < n; i += LANES) STORE(dst + i, (vfloat)x);
}

/* keep or 0 for elements of the weights (B, H, T, S), the first at `index`, `step` apart */
HOT vfloat dropout_factor(const attention_t* a, u64 index, unsigned step) {
  const vint iota = IOTA;
  const vuint bits = random_bits((unsigned)index + (vuint)iota * step, a->key);
  return select(bits >= a->dropout, (vfloat)a->keep, (vfloat)0.f);
}
