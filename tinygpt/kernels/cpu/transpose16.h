/* Vectors of 16 numbers of 32 bits, whatever LANES is, and the transpose of 16 of them */
typedef float float16 __attribute__((ext_vector_type(16)));
typedef float float16_unaligned __attribute__((ext_vector_type(16), aligned(4)));
typedef int int16 __attribute__((ext_vector_type(16)));
typedef int int16_unaligned __attribute__((ext_vector_type(16), aligned(4)));

/* 16 x 16, transposed: swaps halves of halves of ... */
#define SWAP(distance, i, low, high) { \
    const int16 x = r[i], y = r[i + distance]; \
    r[i] = __builtin_shufflevector(x, y, low); \
    r[i + distance] = __builtin_shufflevector(x, y, high); \
  }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
HOT void transpose16(int16* r) {
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 8)) SWAP(8, i, LOW8, HIGH8)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 4)) SWAP(4, i, LOW4, HIGH4)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 2)) SWAP(2, i, LOW2, HIGH2)
  UNROLL for (int i = 0; i < 16; i++) if (!(i & 1)) SWAP(1, i, LOW1, HIGH1)
}
