/* What a thread of the pool does until the pool stops: wait for a job, spinning first and then
 * asleep, and take tasks of it. */
#include "pool.h"

void NAME(pool_t* pool, u64 worker) {
  u64 seen = pool->ticket >> 32;
  for (;;) {
    u64 spins = 0;
    while ((__atomic_load_n(&pool->ticket, __ATOMIC_ACQUIRE) >> 32) == seen) {
      if (spins++ < pool->spins) {
        CPU_RELAX();
        continue;
      }
      __atomic_store_n(&pool->sleeping[worker], 1, __ATOMIC_SEQ_CST);
      if ((__atomic_load_n(&pool->ticket, __ATOMIC_SEQ_CST) >> 32) == seen)
        ((int (*)(u64, u64))pool->sem_wait)(pool->semaphores[worker], ~0ul);
      __atomic_store_n(&pool->sleeping[worker], 0, __ATOMIC_SEQ_CST);
      spins = 0;
    }
    if (pool->stop) return;
    seen = pool->ticket >> 32;
    pool_take_tasks(pool);
  }
}
