/* out (1) = the sum of squares of all elements of COUNT arrays x, n of them each. The tasks and so
 * the order of the sums do not depend on the number of threads. */
#include "pool.h"
#include "vector.h"
#include "square_sum.h"

#define TASKS 16

typedef struct {
  const float** x;
  const long* n;
  double* sums;
} squares_t;

static void some_squares(void* args, int index);

KERNEL void NAME(ARGUMENTS) {
  DECLARE_NAMES
  double sums[TASKS], total = 0;
  squares_t g = {x, n, sums};
  parallel_for(shared->pool, some_squares, &g, TASKS);
  for (int i = 0; i < TASKS; i++) total += sums[i];
  out[0] = (float)total;
}

KERNEL static void some_squares(void* args, int index) {
  const squares_t* g = args;
  double sum = 0;
  for (int i = 0; i < COUNT; i++)
    sum += square_sum(g->x[i], g->n[i] * index / TASKS, g->n[i] * (index + 1) / TASKS);
  g->sums[index] = sum;
}
