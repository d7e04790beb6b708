/* out (1) = the sum of squares of all elements of COUNT arrays, INPUTS, dims of them each. The tasks
 * and so the order of the sums do not depend on the number of threads. */
#include "pool.h"
#include "vector.h"
#include "square_sum.h"

#define TASKS 16

typedef struct {
  const float** inputs;
  const long* sizes;
  double* sums;
} squares_t;

static void some_squares(void* args, int index);

KERNEL void NAME(ARGUMENTS const long* dims, const u64* table) {
  const float* inputs[COUNT] = {INPUTS};
  double sums[TASKS], total = 0;
  squares_t g = {inputs, dims, sums};
  parallel_for((pool_t*)table[0], some_squares, &g, TASKS);
  for (int i = 0; i < TASKS; i++) total += sums[i];
  out[0] = (float)total;
}

KERNEL static void some_squares(void* args, int index) {
  const squares_t* g = args;
  double sum = 0;
  for (int i = 0; i < COUNT; i++)
    sum += square_sum(g->inputs[i], g->sizes[i] * index / TASKS, g->sizes[i] * (index + 1) / TASKS);
  g->sums[index] = sum;
}
