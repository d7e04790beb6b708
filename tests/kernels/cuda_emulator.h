/* Runs a CUDA C++ kernel of tinygpt/kernels/cuda on a CPU: each thread of a block is a coroutine, which
 * others replace where it waits for them. Copies that are asynchronous on a GPU happen when they are
 * waited for, as late as a GPU may make them, and shared memory is filled with NaN before a block. */
#define EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("block_memory")))

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct index3 { unsigned x, y, z; };
static index3 threadIdx, blockIdx;
static inline long min(long a, long b) { return a < b ? a : b; }
#define rsqrtf(x) (1.f / sqrtf(x))
static inline int __ffs(unsigned x) { return __builtin_ffs(x); }

enum { MOST_THREADS = 1024, STACK = 1 << 16, MOST_COPIES = 64 };
struct copy { void* to; const void* from; bool there; };
struct coroutine {
  ucontext_t start;
  void* here[5]; /* where it waits */
  bool begun, done;
  copy copies[MOST_COPIES];
  int copy_count, group_sizes[MOST_COPIES], groups, open; /* `open` of the last have no group yet */
};
static coroutine threads[MOST_THREADS];
static void* scheduler[5];
static int current;

/* Jumps, since swapcontext would call the kernel each time */
static __attribute__((noinline)) void leave() { __builtin_longjmp(scheduler, 1); }
static __attribute__((noinline)) void yield() {
  if (!__builtin_setjmp(threads[current].here)) leave();
  asm volatile(""); /* the frame that is jumped to must not end in a tail call */
}
static __attribute__((noinline)) void enter(coroutine* t) {
  if (t->begun) __builtin_longjmp(t->here, 1);
  t->begun = true;
  setcontext(&t->start);
}
static __attribute__((noinline)) void proceed(coroutine* t) {
  if (!__builtin_setjmp(scheduler)) enter(t);
  asm volatile("");
}

/* Where `count` threads from `first` on meet */
struct meeting { int arrived; unsigned rounds; };
static meeting of_block, of_warp[MOST_THREADS / 32];

static inline void meet(meeting* m, int count) {
  const unsigned round = m->rounds;
  if (++m->arrived == count) {
    m->arrived = 0;
    m->rounds++;
  }
  while (m->rounds == round) yield();
}
static inline int warp() { return current / 32; }
static inline int lane() { return current % 32; }
static inline void meet_warp() { meet(&of_warp[warp()], 32); }
static inline void __syncthreads() { meet(&of_block, THREADS); }

/* What the lanes of a warp show one another */
static union { unsigned words[8]; const void* row; float number; } shown[MOST_THREADS];
static inline auto& of_lane(int i) { return shown[warp() * 32 + i]; }

static inline int __syncthreads_or(int x) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= x;
  __syncthreads();
  return any;
}
static inline float __shfl_xor_sync(unsigned, float x, int mask) {
  of_lane(lane()).number = x;
  meet_warp();
  const float y = of_lane(lane() ^ mask).number;
  meet_warp();
  return y;
}
static inline unsigned __ballot_sync(unsigned, bool x) {
  of_lane(lane()).words[0] = x;
  meet_warp();
  unsigned mask = 0;
  for (int i = 0; i < 32; i++) mask |= of_lane(i).words[0] << i;
  meet_warp();
  return mask;
}

struct bf16;
struct f16;
static inline float to_float(bf16 x);
static inline float to_float(f16 x);
static inline void from_float(float x, bf16* y);
static inline void from_float(float x, f16* y);

/* c (16, 8) += a (16, 16) b (16, 8), where lanes have their elements as in PTX */
template <typename T> static inline void multiply(float* c, const unsigned* a, const unsigned* b, T) {
  memcpy(of_lane(lane()).words, a, 16);
  memcpy(of_lane(lane()).words + 4, b, 8);
  meet_warp();
  for (int e = 0; e < 4; e++) {
    const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
    for (int k = 0; k < 16; k++) {
      T x, y;
      const unsigned left = of_lane(row % 8 * 4 + k % 8 / 2).words[k / 8 * 2 + row / 8];
      const unsigned right = of_lane(column * 4 + k % 8 / 2).words[4 + k / 8];
      x.bits = left >> k % 2 * 16;
      y.bits = right >> k % 2 * 16;
      c[e] += to_float(x) * to_float(y);
    }
  }
  meet_warp();
}

static inline void load_matrices(unsigned* x, const void* row) {
  of_lane(lane()).row = row;
  meet_warp();
  for (int i = 0; i < 4; i++) {
    const unsigned short* r = (const unsigned short*)of_lane(i * 8 + lane() / 4).row;
    x[i] = r[lane() % 4 * 2] | (unsigned)r[lane() % 4 * 2 + 1] << 16;
  }
  meet_warp();
}
static inline void load_transposed(unsigned* x, const void* row) {
  of_lane(lane()).row = row;
  meet_warp();
  for (int i = 0; i < 4; i++) {
    x[i] = 0;
    for (int e = 0; e < 2; e++)
      x[i] |= (unsigned)((const unsigned short*)of_lane(i * 8 + lane() % 4 * 2 + e).row)[lane() / 4]
              << e * 16;
  }
  meet_warp();
}

static inline void copy_later(void* to, const void* from, bool there) {
  if (((size_t)to | (size_t)from) % 16) abort();
  coroutine* t = &threads[current];
  if (t->copy_count == MOST_COPIES) abort();
  t->copies[t->copy_count++] = {to, from, there};
  t->open++;
}
static inline void end_group() {
  coroutine* t = &threads[current];
  t->group_sizes[t->groups++] = t->open;
  t->open = 0;
}
template <int left> static inline void wait_for_copies() {
  coroutine* t = &threads[current];
  while (t->groups > left) {
    const int count = t->group_sizes[0];
    for (int i = 0; i < count; i++)
      if (t->copies[i].there) memcpy(t->copies[i].to, t->copies[i].from, 16);
      else memset(t->copies[i].to, 0, 16);
    memmove(t->copies, t->copies + count, (t->copy_count -= count) * sizeof(copy));
    memmove(t->group_sizes, t->group_sizes + 1, --t->groups * sizeof(int));
  }
}

__shared__ volatile char first; /* so that there is such a section */
extern char __start_block_memory[], __stop_block_memory[];
extern "C" void NAME(ARGUMENTS);
static void** arguments;
static void begin();

/* Runs all blocks, one after the other. */
extern "C" void run(void** given, int width, int height) {
  static char* stacks = (char*)malloc((size_t)THREADS * STACK);
  arguments = given;
  first = 0;
  for (blockIdx.y = 0; (int)blockIdx.y < height; blockIdx.y++)
    for (blockIdx.x = 0; (int)blockIdx.x < width; blockIdx.x++) {
      memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
      memset(&of_block, 0, sizeof of_block);
      memset(of_warp, 0, sizeof of_warp);
      for (int i = 0; i < THREADS; i++) {
        coroutine* t = &threads[i];
        t->begun = t->done = false;
        t->copy_count = t->groups = t->open = 0;
        getcontext(&t->start);
        t->start.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        t->start.uc_stack.ss_size = STACK;
        makecontext(&t->start, begin, 0);
      }
      for (int left = THREADS; left;)
        for (int i = 0; i < THREADS; i++) {
          if (threads[i].done) continue;
          current = threadIdx.x = i;
          proceed(&threads[i]);
          left -= threads[i].done;
        }
    }
}
