/* c (SPLITS, M, N) = a b + bias (N) + residual (M, N), products of 16-bit numbers on tensor cores,
 * summed in float32; part s of c has the products of its share of K, and only one part has a bias
 * and a residual. a is (M, K), with A_TRANSPOSED (K, M); b is (N, K), with B_ROWS (K, N). Rows of
 * a, b and c are aligned to 16 bytes.
 *
 * A block of four warps computes TILE x TILE of c, a warp a quarter of it. Slices of DEPTH of a and
 * b are copied to shared memory, STAGES - 1 ahead of the products. Their rows of 16-byte chunks are
 * permuted so that neither the copies nor the loads of matrices meet in a bank. */
#define TILE 128
#define DEPTH 32
#define STAGES 3
#define GROUP 8 /* blocks that run at the same time share rows of tiles, for the L2 cache */

#include "common.h"
#include "tensor_core.h"

/* Where a chunk of 8 numbers is in a slice whose rows are those of a matrix, along K ... */
DEVICE int place_along_k(int row, int chunk) {
  return row * DEPTH + (chunk ^ (row / 2 % 4)) * 8;
}
/* ... and in one whose rows are along the other side */
DEVICE int place_across_k(int k, int chunk) { return k * TILE + (chunk ^ (k % 8)) * 8; }

/* Copies rows [first, first + TILE) and columns [k, k + DEPTH) of x (rows, depth), which with
 * `transposed` is stored (depth, rows). `end` is where the columns of this block's part end. */
template <bool transposed>
DEVICE void copy_slice(a_t* to, const a_t* x, long rows, long depth, long first, long k, long end) {
  const bool inside = rows % TILE == 0, whole = depth % (SPLITS * DEPTH) == 0;
  const int across = transposed ? TILE / 8 : DEPTH / 8; /* chunks in a row of memory */
  const int chunk = threadIdx.x % across, line = threadIdx.x / across, lines = THREADS / across;
  const a_t* from = x + (transposed ? (k + line) * rows + first + chunk * 8
                                    : (first + line) * depth + k + chunk * 8);
#pragma unroll
  for (int i = 0; i < TILE * DEPTH / 8 / THREADS; i++) {
    const int row = line + i * lines;
    const bool there = transposed
        ? (whole || k + row < end) && (inside || first + chunk * 8 < rows)
        : (inside || first + row < rows) && (whole || k + chunk * 8 < end);
    copy_later(to + (transposed ? place_across_k(row, chunk) : place_along_k(row, chunk)),
               there ? from + i * lines * (transposed ? rows : depth) : x, there);
  }
}

/* A warp's part of a slice, 16 along K from k on: rows [row, row + 64) of a and columns
 * [col, col + 64) of b, each as four matrices (16, 16) */
DEVICE void load_part(unsigned (*as)[4], unsigned (*bs)[4], const a_t (*slice)[TILE * DEPTH],
                      int k, int row, int col) {
  const int lane = LANE;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = row + i * 16, c = col + i * 16;
    if (A_TRANSPOSED) load_transposed(as[i], slice[0] + place_across_k(
        k + lane / 16 * 8 + lane % 8, r / 8 + lane / 8 % 2));
    else load_matrices(as[i], slice[0] + place_along_k(r + lane % 16, k / 8 + lane / 16));
    if (B_ROWS) load_transposed(bs[i], slice[1] + place_across_k(
        k + lane / 8 % 2 * 8 + lane % 8, c / 8 + lane / 16));
    else load_matrices(bs[i], slice[1] + place_along_k(
        c + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) NAME(ARGUMENTS) {
  DECLARE_NAMES
  __shared__ __align__(128) a_t slices[STAGES][2][TILE * DEPTH];
  const long tall = (M + TILE - 1) / TILE, wide = (N + TILE - 1) / TILE;
  /* groups of GROUP rows of tiles, column by column */
  const long group = blockIdx.x / (GROUP * wide), rest = blockIdx.x % (GROUP * wide);
  const long height = min((long)GROUP, tall - group * GROUP);
  const long first_row = (group * GROUP + rest % height) * TILE, first_col = rest / height * TILE;
  const long share = (K + SPLITS * DEPTH - 1) / (SPLITS * DEPTH) * DEPTH;
  const long begin = blockIdx.y * share, end = min(begin + share, K);
  const int count = (int)((end - begin + DEPTH - 1) / DEPTH);
  const int row = WARP_OF_BLOCK / 2 * 64, col = WARP_OF_BLOCK % 2 * 64; /* of the warp's quarter */
  float sums[4][8][4] = {};
  unsigned as[2][4][4], bs[2][4][4]; /* what is multiplied, and what comes next */

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < count) {
      copy_slice<A_TRANSPOSED>(slices[s][0], a, M, K, first_row, begin + s * DEPTH, end);
      copy_slice<B_ROWS>(slices[s][1], b, N, K, first_col, begin + s * DEPTH, end);
    }
    end_group();
  }
  wait_for_copies<STAGES - 2>();
  __syncthreads();
  load_part(as[0], bs[0], slices[0], 0, row, col);
  for (int s = 0, stage = 0; s < count; s++) {
    const int next = s + STAGES - 1, free = stage == 0 ? STAGES - 1 : stage - 1;
    if (next < count) {
      copy_slice<A_TRANSPOSED>(slices[free][0], a, M, K, first_row, begin + next * DEPTH, end);
      copy_slice<B_ROWS>(slices[free][1], b, N, K, first_col, begin + next * DEPTH, end);
    }
    end_group();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      const int now = k / 16 % 2;
      if (k + 16 < DEPTH) {
        load_part(as[1 - now], bs[1 - now], slices[stage], k + 16, row, col);
      } else {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        load_part(as[1 - now], bs[1 - now], slices[stage], 0, row, col);
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
          multiply(sums[i][j], as[now][i], &bs[now][j / 2][j % 2 * 2], a_t());
    }
  }
  wait_for_copies<0>();

  const int lane = LANE;
  c_t* out = c + blockIdx.y * M * N;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const long m = first_row + row + i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const long n = first_col + col + j * 8 + lane % 4 * 2;
        if (m >= M || n >= N) continue;
        union { c_t each[2]; struct { unsigned words[sizeof(c_t) / 2]; } all; } u;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float y = sums[i][j][half * 2 + e];
          if (bias) y += to_float(bias[n + e]);
          if (residual) y += to_float(residual[m * N + n + e]);
          from_float(y, &u.each[e]);
        }
        *(decltype(u.all)*)(out + m * N + n) = u.all;
      }
    }
}
