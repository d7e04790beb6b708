/* One matrix product; gemm.h says of what. */
#include "gemm.h"

KERNEL void NAME(ARGUMENTS const long* dims, const u64* table) {
  gemm_t g = {.a = a, .b = b, .bias = BIAS, .residual = RESIDUAL, .c = c, .sums = SUMS,
              .partial = PARTIAL, .packed_b = (void*)table[1], .M = dims[0], .N = dims[1],
              .K = dims[2], .ta = (int)dims[3], .tb = (int)dims[4]};
  product((pool_t*)table[0], &g);
}

#if AMX
#include "gemm_amx.h"
#else
#include "gemm_float.h"
#endif
