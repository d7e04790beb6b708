/* A pool of threads that forks and joins in about a microsecond.
 *
 * Work is handed out by a 64-bit ticket, generation << 32 | next index, so that a worker that
 * wakes up late can never take part of a newer job, and the caller waits only for the tasks that
 * were taken. The pool lives in one block of memory that threads.py allocates and fills.
 *
 * The entry of a kernel is KERNEL void NAME(ARGUMENTS) { DECLARE_NAMES ... }. kernel.py defines
 * ARGUMENTS, the tensors that are given, DECLARE_NAMES, which declares each size, and each tensor
 * that is missing as 0, and the type of a tensor's elements, the tensor's name with _t. */
typedef unsigned long u64;
typedef unsigned int u32;
typedef void (*task_fn)(void* args, int index);

typedef struct {
  task_fn run;
  void* args;
  u64 count;
  u64 unused[5];
} job_t;

typedef struct {
  volatile u64 ticket; u64 unused0[7];
  volatile u64 done; u64 unused1[7];          /* finished tasks of the current job */
  u64 threads, spins, sem_post, sem_wait, stop, unused2[3];
  volatile u64 sleeping[64];
  u64 semaphores[64];
  job_t jobs[16];                             /* by generation modulo 16 */
} pool_t;

typedef struct { pool_t* pool; void* workspace; u64 workspace_bytes; } shared_t;

#if defined(__x86_64__)
#define CPU_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define CPU_RELAX() __asm__ volatile("yield")
#else
#define CPU_RELAX()
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE void pool_take_tasks(pool_t* pool) {
  for (;;) {
    u64 ticket = __atomic_load_n(&pool->ticket, __ATOMIC_ACQUIRE);
    job_t* job = &pool->jobs[(ticket >> 32) & 15];
    if ((u32)ticket >= job->count) return;
    task_fn run = job->run;
    void* args = job->args;
    if (!__atomic_compare_exchange_n(&pool->ticket, &ticket, ticket + 1, 0, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) continue;
    run(args, (int)(u32)ticket);
    __atomic_fetch_add(&pool->done, 1, __ATOMIC_RELEASE);
  }
}

#define SMALL 32768   /* multiplications, which take as long as handing some of them over */

/* run(args, i) for i in 0 .. count-1, spread over the threads; returns when all are finished */
INLINE void parallel_for(pool_t* pool, task_fn run, void* args, long count) {
  if (count <= 1 || pool->threads <= 1) {
    for (long i = 0; i < count; i++) run(args, (int)i);
    return;
  }
  u64 generation = (pool->ticket >> 32) + 1;
  job_t* job = &pool->jobs[generation & 15];
  job->run = run;
  job->args = args;
  job->count = (u64)count;
  pool->done = 0;
  __atomic_store_n(&pool->ticket, generation << 32, __ATOMIC_SEQ_CST);
  u64 helpers = pool->threads - 1;
  if (helpers > (u64)count - 1) helpers = (u64)count - 1;
  for (u64 w = 0; w < helpers; w++)
    if (__atomic_load_n(&pool->sleeping[w], __ATOMIC_SEQ_CST))
      ((int (*)(u64))pool->sem_post)(pool->semaphores[w]);
  pool_take_tasks(pool);
  while (__atomic_load_n(&pool->done, __ATOMIC_ACQUIRE) < (u64)count) CPU_RELAX();
}

/* the same for work of so many multiplications; little work stays in the thread that calls */
INLINE void parallel_for_work(pool_t* pool, task_fn run, void* args, long count, long work) {
  if (work >= SMALL) return parallel_for(pool, run, args, count);
  for (long i = 0; i < count; i++) run(args, (int)i);
}
