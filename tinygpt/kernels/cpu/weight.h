/* Weights that are read as float32 and may be stored smaller: WEIGHT 32 is float32, 16 float16,
 * 8 int8, whose scale the caller applies. */
#if WEIGHT == 32
typedef float weight_t;
#define LOAD_WEIGHTS(w) LOAD(w)
HOT float to_float(weight_t w) { return w; }

#elif WEIGHT == 16 && (defined(__F16C__) || defined(__AVX512F__) || defined(__aarch64__))
typedef _Float16 weight_t;
typedef _Float16 vhalf __attribute__((ext_vector_type(LANES), aligned(2)));
#define LOAD_WEIGHTS(w) __builtin_convertvector(*(const vhalf*)(w), vfloat)
HOT float to_float(weight_t w) { return (float)w; }

#elif WEIGHT == 16
/* no instruction converts: exponent and mantissa move to their place in a float32, whose exponent
 * has another bias */
typedef unsigned short weight_t;
typedef unsigned short vhalf __attribute__((ext_vector_type(LANES), aligned(2)));
HOT vfloat from_half(vuint h) {
  const vfloat size = (vfloat)((h & 0x7fff) << 13) * 0x1p112f;
  return (vfloat)((vuint)size | (h & 0x8000) << 16);
}
#define LOAD_WEIGHTS(w) from_half(__builtin_convertvector(*(const vhalf*)(w), vuint))
HOT float to_float(weight_t w) { return from_half((vuint)(unsigned)w)[0]; }

#elif WEIGHT == 8
typedef signed char weight_t;
typedef signed char vbyte __attribute__((ext_vector_type(LANES), aligned(1)));
#define LOAD_WEIGHTS(w) __builtin_convertvector(*(const vbyte*)(w), vfloat)
HOT float to_float(weight_t w) { return (float)w; }
#endif
