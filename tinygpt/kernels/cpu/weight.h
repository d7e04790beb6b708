/* Weights that are read as float32. weight_t is float, bf16, f16, or signed char, where each row
 * has a scale. With INT4 1 it is unsigned char, and each group of GROUP weights of a row has a
 * scale, a float16. Such a group is 16 bytes: weight i is the low half of byte i, weight 16 + i the
 * high half, each 0 .. 15 for -8 .. 7 (llama.cpp's Q4_0). The last group of a row is filled up. */
#define GROUP 32

#ifndef scale_t          /* no weight has a scale */
#define scale_t float
#endif

typedef signed char vbyte __attribute__((ext_vector_type(LANES), aligned(1)));
typedef unsigned char byte16 __attribute__((ext_vector_type(16), aligned(1)));

#define BY_WEIGHT(p, f) \
  _Generic((p), const float*: f##_f32, const bf16*: f##_bf16, \
           const f16*: f##_f16, const signed char*: f##_i8)
#define LOAD_WEIGHTS(p) BY_WEIGHT(p, load)(p)
#define GET_WEIGHT(p) BY_WEIGHT(p, get)(p)

HOT vfloat load_i8(const signed char* p) {
  return __builtin_convertvector(*(const vbyte*)p, vfloat);
}
HOT float get_i8(const signed char* p) { return (float)*p; }

/* a group of four-bit weights, without its scale */
HOT void load_group(const unsigned char* p, vfloat w[GROUP / LANES]) {
  const byte16 bytes = *(const byte16*)p;
#if defined(__AVX512F__)
  typedef float vsums __attribute__((vector_size(64)));
  typedef int vindex __attribute__((vector_size(64)));
  const vfloat values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const vint index = __builtin_convertvector(bytes, vint);   /* of which four bits count */
  w[0] = (vfloat)__builtin_ia32_permvarsf512((vsums)values, (vindex)index);
  w[1] = (vfloat)__builtin_ia32_permvarsf512((vsums)values, (vindex)(index >> 4));
#else
  signed char weights[GROUP];
  *(byte16*)weights = (bytes & 15) - 8;
  *(byte16*)(weights + 16) = (bytes >> 4) - 8;
  UNROLL for (int i = 0; i < GROUP / LANES; i++) w[i] = load_i8(weights + i * LANES);
#endif
}

/* dst = weights first .. last of row n of K, with their scale; with INT4 whole groups */
HOT void load_weights(float* dst, const weight_t* weight, const scale_t* scale, long n, long K,
                      long first, long last) {
#if INT4
  const long row = n * ((K + GROUP - 1) / GROUP);
  for (long k = first; k < last; k += GROUP) {
    const long i = row + k / GROUP;
    vfloat w[GROUP / LANES];
    load_group(weight + i * GROUP / 2, w);
    UNROLL for (int x = 0; x < GROUP / LANES; x++)
      STORE(dst + k - first + x * LANES, w[x] * GET(scale + i));
  }
#else
  const weight_t* row = weight + n * K;
  const float factor = scale ? scale[n] : 1.f;
  long k = first;
  for (; k + LANES <= last; k += LANES) STORE(dst + k - first, LOAD_WEIGHTS(row + k) * factor);
  for (; k < last; k++) dst[k - first] = GET_WEIGHT(row + k) * factor;
#endif
}
