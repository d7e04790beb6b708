/* sum + the products of pairs of bfloat16, those of a lane being in its 32 bits: what AVX512_BF16 and
 * Arm's BF16 have an instruction for; elsewhere the same in float32, to be tested on. */

HOT vfloat dot_pairs(vfloat sum, vint a, vint b) {
#if defined(__AVX512BF16__)
  typedef __bf16 vpairs __attribute__((vector_size(64)));
  typedef float vsums __attribute__((vector_size(64)));
  return (vfloat)__builtin_ia32_dpbf16ps_512((vsums)sum, (vpairs)a, (vpairs)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  typedef float vsums __attribute__((neon_vector_type(4)));
  typedef __bf16 vpairs __attribute__((neon_vector_type(8)));
  vsums r = (vsums)sum;
  __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(r) : "w"((vpairs)a), "w"((vpairs)b));
  return (vfloat)r;
#else
  sum += (vfloat)(a << 16) * (vfloat)(b << 16);
  return sum + (vfloat)(a & (int)0xffff0000) * (vfloat)(b & (int)0xffff0000);
#endif
}

/* of two vectors of 16, or of the halves of one of 32 */
#define INTERLEAVED 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, \
                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

/* numbers in pairs, rounded to bfloat16 */
HOT vint to_pairs(vfloat low, vfloat high) {
#if defined(__AVX512BF16__)
  typedef float vsums __attribute__((vector_size(64)));
  typedef unsigned short shorts __attribute__((ext_vector_type(32)));
  const shorts both = (shorts)__builtin_ia32_cvtne2ps2bf16_512((vsums)high, (vsums)low);
  return (vint)__builtin_shufflevector(both, both, INTERLEAVED);
#else
  const vuint l = (vuint)low, h = (vuint)high;
  const vuint rounded = h + 0x7fff + ((h >> 16) & 1);
  return (vint)((l + 0x7fff + ((l >> 16) & 1)) >> 16 | (rounded & 0xffff0000));
#endif
}
