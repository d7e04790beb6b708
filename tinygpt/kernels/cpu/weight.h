/* Weights that are read as float32. weight_t is float, bf16, f16, or signed char, whose scale the
 * caller applies. */
typedef signed char vbyte __attribute__((ext_vector_type(LANES), aligned(1)));

#define BY_WEIGHT(p, f) \
  _Generic((p), const float*: f##_f32, const bf16*: f##_bf16, \
           const f16*: f##_f16, const signed char*: f##_i8)
#define LOAD_WEIGHTS(p) BY_WEIGHT(p, load)(p)
#define GET_WEIGHT(p) BY_WEIGHT(p, get)(p)

HOT vfloat load_i8(const signed char* p) {
  return __builtin_convertvector(*(const vbyte*)p, vfloat);
}
HOT float get_i8(const signed char* p) { return (float)*p; }
