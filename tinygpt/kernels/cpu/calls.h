/* Captured kernels in the order in which they run, each with the arguments that it was captured
 * with. */
#include "pool.h"

#define FEW 10                  /* arguments that most kernels have at most */
#define TEN_WORDS u64, u64, u64, u64, u64, u64, u64, u64, u64, u64
#define TEN(i) a[i], a[i + 1], a[i + 2], a[i + 3], a[i + 4], a[i + 5], a[i + 6], a[i + 7], \
               a[i + 8], a[i + 9]

/* a kernel does not look at arguments that it does not have */
typedef void (*few_fn)(TEN_WORDS);
typedef void (*many_fn)(TEN_WORDS, TEN_WORDS, TEN_WORDS, TEN_WORDS, TEN_WORDS, TEN_WORDS);

typedef struct {
  u64 code;
  u64 parts;                    /* how many calls from this one on may run at the same time */
  u64 room;                     /* for arguments: 10 or 60 */
  u64 arguments[];
} call_t;

INLINE const call_t* call_after(const call_t* call, u64 count) {
  return (const call_t*)(&call->code + count * (sizeof(call_t) / sizeof(u64) + call->room));
}

INLINE void run_call(const call_t* call) {
  const u64* a = call->arguments;
  if (call->room == FEW) ((few_fn)call->code)(TEN(0));
  else ((many_fn)call->code)(TEN(0), TEN(10), TEN(20), TEN(30), TEN(40), TEN(50));
}

static void run_part(void* args, int index);

INLINE void run_calls(pool_t* pool, const call_t* calls, const call_t* end) {
  for (const call_t* call = calls; call < end; call = call_after(call, call->parts))
    if (call->parts == 1) run_call(call);
    else parallel_for(pool, run_part, (void*)call, call->parts);
}
