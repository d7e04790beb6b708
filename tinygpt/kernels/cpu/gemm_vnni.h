/* The micro kernel of gemm.h on AVX512_VNNI's products of 16-bit integers, for a B of four or eight
 * bits that is stored transposed. Each GROUP of numbers in a row of A is rounded to 16 bits, to
 * multiples of 1/32767 of its largest magnitude, and multiplied by the integers of B, summed in 32
 * bits; the scales of both follow in float32. */

typedef short short16 __attribute__((ext_vector_type(16)));
typedef short short32 __attribute__((ext_vector_type(32)));

/* Panels have a scale for each group, then pairs of integers: [depth / GROUP][n], [depth / 2][n] */
#define PANEL(depth, n) (((depth) / GROUP + (depth) / 2) * (n))
#define A_STRIDE(depth) (PANEL(depth, GM) + 16)   /* + 16: panels must not share a cache set */
#define B_STRIDE(depth) PANEL(depth, GN)

/* sum + the products of pairs of integers, those of a lane being in its 32 bits */
HOT vint dot_integers(vint sum, vint a, vint b) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* 32 integers in 16 pairs */
HOT int16 pairs_of(short16 low, short16 high) {
  short32 row;
  row.lo = low, row.hi = high;
  return (int16)row;
}

/* GROUP numbers from p on, those from the n-th on zero */
HOT void load_numbers(const a_t* p, long n, float16 x[2]) {
  float some[GROUP];
  for (long i = 0; i < GROUP; i += LANES)
    if (i + LANES <= n)
      STORE(some + i, LOAD(p + i));
    else
      for (long j = i; j < i + LANES; j++) some[j] = j < n ? GET(p + j) : 0.f;
  x[0] = *(const float16_unaligned*)some;
  x[1] = *(const float16_unaligned*)(some + 16);
}

/* the integers of x, rounded: adding 1.5 * 2^23 leaves them in the lower bits */
HOT short16 rounded(float16 x) {
  return __builtin_convertvector((int16)(x + 12582912.f), short16);
}

/* rows first .. first + n of A; a vector is stored whole, and the next one overwrites what is behind
 * GM rows. The largest magnitudes are compared as integers, so that a NaN is the largest. */
HOT void pack_panel(const gemm_t* g, long first, long n, long depth, int* panel) {
  int* pairs = panel + depth / GROUP * GM;
  for (long k = 0; k < depth; k += GROUP, panel += GM, pairs += GROUP / 2 * GM) {
    float16 x[16][2];
    int16 r[16];
    for (long i = 0; i < 16; i++) {
      load_numbers(g->a + (first + i) * g->K + g->pc + k, i < MIN(n, GM) ? g->kc - k : 0, x[i]);
      r[i] = __builtin_elementwise_max((int16)x[i][0] & 0x7fffffff, (int16)x[i][1] & 0x7fffffff);
    }
    transpose16(r);
    for (long i = 1; i < 16; i++) r[0] = __builtin_elementwise_max(r[0], r[i]);
    const float16 top = (float16)r[0], scale = top * (1.f / 32767.f);
    const float16 factor = (float16)((int16)(32767.f / top) & (top > 1e-30f));
    for (long i = 0; i < GM; i++) panel[i] = ((int16)scale)[i];
    for (long i = 0; i < 16; i++)
      r[i] = pairs_of(rounded(x[i][0] * factor[i]), rounded(x[i][1] * factor[i]));
    transpose16(r);
    for (long i = 0; i < 16; i++) *(int16_unaligned*)(pairs + i * GM) = r[i];
  }
}

HOT void pack_a(const gemm_t* g, long first, long last, long depth, int* packed) {
  for (long i = first; i < last; i += GM, packed += A_STRIDE(depth))
    pack_panel(g, i, last - i, depth, packed);
}

/* GROUP weights of row n of B from depth k on */
HOT int16 load_integers(const gemm_t* g, long n, long k) {
#if INT4
  const byte16 bytes = *(const byte16*)(g->b + (n * ((g->K + GROUP - 1) / GROUP) + k / GROUP) * 16);
  return pairs_of(__builtin_convertvector(bytes & 15, short16) - 8,
                  __builtin_convertvector(bytes >> 4, short16) - 8);
#else
  typedef signed char char16 __attribute__((ext_vector_type(16), aligned(1)));
  const b_t* p = g->b + n * g->K + k;
  b_t some[GROUP];
  if (k + GROUP > g->K) {
    for (long i = 0; i < GROUP; i++) some[i] = k + i < g->K ? p[i] : 0;
    p = some;
  }
  return pairs_of(__builtin_convertvector(*(const char16*)p, short16),
                  __builtin_convertvector(*(const char16*)(p + 16), short16));
#endif
}
HOT float scale_of(const gemm_t* g, long n, long k) {
#if INT4
  return GET(g->scale + n * ((g->K + GROUP - 1) / GROUP) + k / GROUP);
#else
  return g->scale[n];
#endif
}

KERNEL static void pack_b(void* args, int index) {
  const gemm_t* g = args;
  const long depth = ROUND_UP(g->kc, GROUP);
  for (long p = index * g->panels; p < (index + 1) * g->panels && p * GN < g->nc; p++)
    for (long half = 0; half < GN; half += 16) {
      int* panel = (int*)g->packed_b + p * B_STRIDE(depth) + half;
      int* pairs = panel + depth / GROUP * GN;
      const long n0 = g->jc + p * GN + half, n = g->N - n0;
      for (long k = 0; k < depth; k += GROUP, panel += GN, pairs += GROUP / 2 * GN) {
        float scales[16];
        int16 r[16];
        for (long j = 0; j < 16; j++) {
          r[j] = j < n ? load_integers(g, n0 + j, g->pc + k) : (int16)0;
          scales[j] = j < n ? scale_of(g, n0 + j, g->pc + k) : 0.f;
        }
        transpose16(r);
        *(int16_unaligned*)panel = *(const int16_unaligned*)scales;
        for (long i = 0; i < 16; i++) *(int16_unaligned*)(pairs + i * GN) = r[i];
      }
    }
}

/* sum = a panel of A times one of B */
HOT void block_kernel(const int* a, const int* b, long depth, vfloat sum[GM][GV]) {
  const float *a_scales = (const float*)a, *b_scales = (const float*)b;
  a += depth / GROUP * GM;
  b += depth / GROUP * GN;
  for (int i = 0; i < GM; i++) for (int j = 0; j < GV; j++) sum[i][j] = (vfloat)0.f;
  for (long k = 0; k < depth; k += GROUP, a_scales += GM, b_scales += GN) {
    vint part[GM][GV];
    UNROLL for (int i = 0; i < GM; i++) UNROLL for (int j = 0; j < GV; j++) part[i][j] = (vint)0;
    for (int step = 0; step < GROUP / 2; step++, a += GM, b += GN) {
      vint row[GV];
      UNROLL for (int j = 0; j < GV; j++) row[j] = *(const vint_unaligned*)(b + j * LANES);
      UNROLL for (int i = 0; i < GM; i++)
        UNROLL for (int j = 0; j < GV; j++)
          part[i][j] = dot_integers(part[i][j], (vint)a[i], row[j]);
    }
    UNROLL for (int i = 0; i < GM; i++)
      UNROLL for (int j = 0; j < GV; j++)
        sum[i][j] += __builtin_convertvector(part[i][j], vfloat)
                     * (a_scales[i] * LOAD(b_scales + j * LANES));
  }
}
