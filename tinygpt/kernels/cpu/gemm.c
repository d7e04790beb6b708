/* One matrix product, which gemm.h describes */
#include "gemm.h"

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  gemm_t g = {.a = a, .b = b, .scale = scale, .bias = bias, .residual = residual, .c = c,
              .sums = sums, .partial = partial, .packed_b = shared->workspace,
              .M = M, .N = N, .K = K, .ta = (int)ta, .tb = (int)tb};
  product(shared->pool, &g);
}

#if AMX || DOT
#include "gemm_pairs.h"
#endif
#if AMX
#include "gemm_amx.h"
#elif DOT
#include "gemm_dot.h"
#elif VNNI
#include "gemm_vnni.h"
#else
#include "gemm_float.h"
#endif
#if DOT || VNNI
#include "gemm_multiply.h"
#endif
