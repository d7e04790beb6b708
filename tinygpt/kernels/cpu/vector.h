/* Vectors of float32 through clang's vector extensions: 16 lanes with AVX-512, 8 with AVX, 4 with
 * NEON or SSE, from one source. ROWS x COLS is the block that a micro kernel keeps in registers.
 *
 * Activations have the type that each file names `act`: float, bf16 (bfloat16, the upper half of
 * a float32) or f16 (IEEE's half precision). LOAD and STORE move vectors and GET and PUT numbers of
 * each type, as the pointer says; arithmetic is float32. Numbers are rounded to the nearest, ties
 * to even; those above 65504 become infinite in f16. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#define KERNEL __attribute__((min_vector_width(512)))
#define HOT static inline __attribute__((always_inline, min_vector_width(512)))
#define IOTA {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#define KERNEL
#define HOT static inline __attribute__((always_inline))
#define IOTA {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define LANES 4
#define ROWS 8
#define KERNEL
#define HOT static inline __attribute__((always_inline))
#define IOTA {0, 1, 2, 3}
#endif
#define COLS (2 * LANES)
#define UNROLL _Pragma("clang loop unroll(full)")
#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define ROUND_UP(x, n) (((x) + (n) - 1) / (n) * (n))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vfloat __attribute__((ext_vector_type(LANES)));
typedef int vint __attribute__((ext_vector_type(LANES)));
typedef unsigned vuint __attribute__((ext_vector_type(LANES)));
typedef float vfloat_unaligned __attribute__((ext_vector_type(LANES), aligned(4)));
typedef int vint_unaligned __attribute__((ext_vector_type(LANES), aligned(4)));
typedef float float4 __attribute__((ext_vector_type(4), aligned(4)));

typedef unsigned short bf16;
typedef bf16 vbf16 __attribute__((ext_vector_type(LANES), aligned(2)));
typedef bf16 bf16x4 __attribute__((ext_vector_type(4), aligned(2)));
typedef struct { unsigned short bits; } f16;

#define BY_TYPE(p, f) \
  _Generic((p), float*: f##_f32, const float*: f##_f32, f16*: f##_f16, const f16*: f##_f16, \
           default: f##_bf16)
#define LOAD(p) BY_TYPE(p, load)(p)
#define LOAD4(p) BY_TYPE(p, load4)(p)
#define STORE(p, v) BY_TYPE(p, store)(p, v)
#define GET(p) BY_TYPE(p, get)(p)
#define PUT(p, x) BY_TYPE(p, put)(p, x)

HOT vfloat load_f32(const float* p) { return (vfloat)*(const vfloat_unaligned*)p; }
HOT float4 load4_f32(const float* p) { return *(const float4*)p; }
HOT void store_f32(float* p, vfloat v) { *(vfloat_unaligned*)p = v; }
HOT float get_f32(const float* p) { return *p; }
HOT void put_f32(float* p, float x) { *p = x; }

HOT vfloat load_bf16(const bf16* p) {
  return (vfloat)(__builtin_convertvector(*(const vbf16*)p, vuint) << 16);
}
HOT float4 load4_bf16(const bf16* p) {
  typedef unsigned uint4 __attribute__((ext_vector_type(4)));
  return (float4)(__builtin_convertvector(*(const bf16x4*)p, uint4) << 16);
}
HOT void store_bf16(bf16* p, vfloat v) {
#if LANES == 16 && defined(__AVX512BF16__)
  typedef float vsums __attribute__((vector_size(64)));
  typedef __bf16 rounded __attribute__((vector_size(32)));
  *(vbf16*)p = (vbf16)__builtin_ia32_cvtneps2bf16_512_mask((vsums)v, (rounded){}, 0xffff);
#else
  const vuint bits = (vuint)v;
  *(vbf16*)p = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vbf16);
#endif
}
HOT float get_bf16(const bf16* p) { return __builtin_bit_cast(float, (unsigned)*p << 16); }
HOT void put_bf16(bf16* p, float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  *p = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__) || defined(__AVX512F__) || defined(__aarch64__)
typedef _Float16 vf16 __attribute__((ext_vector_type(LANES), aligned(2)));
typedef _Float16 f16x4 __attribute__((ext_vector_type(4), aligned(2)));
HOT vfloat load_f16(const f16* p) { return __builtin_convertvector(*(const vf16*)p, vfloat); }
HOT float4 load4_f16(const f16* p) {
  return __builtin_convertvector(*(const f16x4*)p, float4);
}
HOT void store_f16(f16* p, vfloat v) { *(vf16*)p = __builtin_convertvector(v, vf16); }
HOT float get_f16(const f16* p) { return (float)*(const _Float16*)p; }
HOT void put_f16(f16* p, float x) { *(_Float16*)p = (_Float16)x; }
#else
/* No instruction converts: exponent and mantissa move to their place in the other type, whose
 * exponent has another bias. */
typedef unsigned short vf16 __attribute__((ext_vector_type(LANES), aligned(2)));
HOT vfloat load_f16(const f16* p) {
  const vuint h = __builtin_convertvector(*(const vf16*)p, vuint);
  const vuint size = (vuint)((vfloat)((h & 0x7fff) << 13) * 0x1p112f);
  const vuint exponent = (vuint)((h & 0x7c00) == 0x7c00) & 0x7f800000; /* infinite, or NaN */
  return (vfloat)(size | exponent | (h & 0x8000) << 16);
}
HOT vuint select_bits(vint mask, vuint yes, vuint no) {
  return (yes & (vuint)mask) | (no & ~(vuint)mask);
}
HOT void store_f16(f16* p, vfloat v) {
  const vuint bits = (vuint)v, size = bits & 0x7fffffff;
  const vuint normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const vuint small = (vuint)((vfloat)size + 0.5f) - 0x3f000000; /* the sum rounds to 2^-24 */
  const vuint nan = (vuint)(size > 0x7f800000) & 0x200;
  vuint h = select_bits(size < (113u << 23), small, normal);
  h = select_bits(size >= 0x477ff000, 0x7c00 | nan, h);          /* 65520 and above */
  *(vf16*)p = __builtin_convertvector(h | (bits >> 16 & 0x8000), vf16);
}
HOT float get_f16(const f16* p) {
  f16 some[LANES] = {*p};
  return load_f16(some)[0];
}
HOT void put_f16(f16* p, float x) {
  f16 some[LANES];
  store_f16(some, (vfloat)x);
  *p = some[0];
}
HOT float4 load4_f16(const f16* p) {
  f16 some[LANES] = {p[0], p[1], p[2], p[3]};
  const vfloat x = load_f16(some);
  return (float4){x[0], x[1], x[2], x[3]};
}
#endif

/* n rounded down to whole vectors */
#define VECTOR_END(n) ((n) / LANES * LANES)

HOT vfloat vabs(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }
HOT vfloat select(vint mask, vfloat yes, vfloat no) {
  return (vfloat)(((vint)yes & mask) | ((vint)no & ~mask));
}

/* NaN where b is */
HOT vfloat vmax(vfloat a, vfloat b) { return select(a > b, a, b); }

/* 2^x to 2e-7 of its value; x is clamped to [-126, 126], and NaN stays */
HOT vfloat vexp2(vfloat x) {
  x = select(x < -126.f, (vfloat)(-126.f), x);
  x = select(x > 126.f, (vfloat)126.f, x);
  vfloat shifted = x + 12582912.f;                   /* 1.5 * 2^23: rounds x to an integer */
  vfloat r = x - (shifted - 12582912.f);
  vfloat p = 1.5403530e-4f * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (vfloat)((vint)p + ((vint)shifted << 23));
}
HOT vfloat vexp(vfloat x) { return vexp2(x * LOG2E); }
HOT float sexp(float x) { return vexp((vfloat)x)[0]; }

/* log2 of a positive normal float: 2 atanh((m-1)/(m+1)) with m in [sqrt(1/2), sqrt(2)); NaN stays */
HOT float slog2(float x) {
  int bits = __builtin_bit_cast(int, x);
  int exponent = (bits - 0x3f3504f3) >> 23;
  float m = __builtin_bit_cast(float, bits - (exponent << 23)) - 1.0f;
  float s = m / (m + 2.0f), z = s * s;
  float p = 0.2222222f;
  p = p * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.0f;
  return s * p * LOG2E + (float)exponent + (x - x);
}

/* the upper half is added to the lower one until a number is left */
HOT float vsum(vfloat v) {
#if LANES == 16
  const __typeof__(v.lo) eight = v.lo + v.hi;
  const __typeof__(eight.lo) four = eight.lo + eight.hi;
#elif LANES == 8
  const __typeof__(v.lo) four = v.lo + v.hi;
#else
  const vfloat four = v;
#endif
  const __typeof__(four.lo) two = four.lo + four.hi;
  return two.x + two.y;
}
HOT float vmaximum(vfloat v) {
  float s[LANES];
  STORE(s, v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) s[i] = MAX(s[i], s[i + n]);
  return s[0];
}

/* Wellons' lowbias32, as in kernels/random.py: bits of element `index` of the stream `key` */
HOT vuint mix(vuint x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
HOT vuint random_bits(vuint index, unsigned key) { return mix(mix(index) + key); }

/* four rows of four, lds apart, transposed to dst with row stride ldd */
#define TRANSPOSE4(src, lds, dst, ldd) \
  transpose4(LOAD4(src), LOAD4((src) + (lds)), LOAD4((src) + 2 * (lds)), \
             LOAD4((src) + 3 * (lds)), dst, ldd)
HOT void transpose4(float4 a, float4 b, float4 c, float4 d, float* dst, long ldd) {
  float4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  float4 ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  float4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  float4 cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *(float4*)dst = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  *(float4*)(dst + ldd) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  *(float4*)(dst + 2 * ldd) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
  *(float4*)(dst + 3 * ldd) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}
