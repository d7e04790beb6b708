/* The types of a product's operands: A_BF16, B_BF16, C_BF16 are 1 where that matrix is bfloat16,
 * and else it is float32. */
#if A_BF16
typedef bf16 a_t;
#else
typedef float a_t;
#endif
#if B_BF16
typedef bf16 b_t;
#else
typedef float b_t;
#endif
#if C_BF16
typedef bf16 c_t;
#else
typedef float c_t;
#endif
