/* Multiply-adds and nothing else on every thread of the pool: in float32, or with AMX or DOT those
 * of bfloat16 (gemm.h). seconds (threads, BURSTS, 2) is when each burst of ROUNDS rounds began and
 * ended, by libc's clock_gettime. Returns the floating-point operations of a burst. */
#include "pool.h"
#include "vector.h"

#define SUMS (2 * ROWS)   /* independent ones: more than a multiply-add takes cycles */
#if AMX
#include "amx.h"
#define FLOPS_A_ROUND (4 * 2 * 16 * 16 * 32)
#elif DOT
#include "dot_pairs.h"
#define FLOPS_A_ROUND (SUMS * 4 * LANES)
#else
#define FLOPS_A_ROUND (SUMS * 2 * LANES)
#endif

typedef struct {
  int (*clock_gettime)(long clock, long* time);
  long clock;
  double* seconds;
} work_t;

static void bursts(void* args, int index);

KERNEL long NAME(pool_t* pool, void* clock_gettime, long clock, double* seconds) {
  work_t work = {clock_gettime, clock, seconds};
  parallel_for(pool, bursts, &work, (long)pool->threads);
  return (long)ROUNDS * FLOPS_A_ROUND;
}

HOT void burst(void) {
#if AMX
  float ones[16 * 16];
  for (int i = 0; i < 16 * 16; i++) ones[i] = 1.f;
  TILES_BEGIN
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  TILE_LOAD(4, ones, 64);
  TILE_LOAD(5, ones, 64);
  TILE_LOAD(6, ones, 64);
  TILE_LOAD(7, ones, 64);
  for (long r = 0; r < ROUNDS; r++) {
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
  TILES_END
#else
  volatile float number = 0.5f;   /* volatile: the compiler must not compute it all by itself */
  const vfloat half = (vfloat)number;
  vfloat sum[SUMS], total = (vfloat)0.f;
  UNROLL for (int i = 0; i < SUMS; i++) sum[i] = (vfloat)(float)i;
  for (long r = 0; r < ROUNDS; r++)
    UNROLL for (int i = 0; i < SUMS; i++)
#if DOT
      sum[i] = dot_pairs(sum[i], (vint)half, (vint)half);
#else
      sum[i] = sum[i] * half + half;
#endif
  UNROLL for (int i = 0; i < SUMS; i++) total += sum[i];
  number = vsum(total);
#endif
}

HOT double now(const work_t* work) {
  long time[2];
  work->clock_gettime(work->clock, time);
  return (double)time[0] + 1e-9 * (double)time[1];
}

KERNEL static void bursts(void* args, int index) {
  const work_t* work = args;
  for (double* seconds = work->seconds + 2 * BURSTS * index, *end = seconds + 2 * BURSTS;
       seconds < end; seconds += 2) {
    seconds[0] = now(work);
    burst();
    seconds[1] = now(work);
  }
}
