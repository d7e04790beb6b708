/* Weights that are read as float32 and may be stored smaller: WEIGHT 32 is float32, 16 float16,
 * 8 int8, whose scale the caller applies. */
#if WEIGHT == 32
typedef float weight_t;
#define LOAD_WEIGHTS(w) LOAD(w)
HOT float to_float(weight_t w) { return w; }

#elif WEIGHT == 16
typedef f16 weight_t;
#define LOAD_WEIGHTS(w) LOAD(w)
HOT float to_float(weight_t w) { return GET(&w); }

#elif WEIGHT == 8
typedef signed char weight_t;
typedef signed char vbyte __attribute__((ext_vector_type(LANES), aligned(1)));
#define LOAD_WEIGHTS(w) __builtin_convertvector(*(const vbyte*)(w), vfloat)
HOT float to_float(weight_t w) { return (float)w; }
#endif
