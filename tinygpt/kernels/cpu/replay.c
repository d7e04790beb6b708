/* Runs the kernels of a captured step without Python between them. */
#include "calls.h"

void NAME(ARGUMENTS) {
  DECLARE_NAMES
  run_calls(shared->pool, (const call_t*)calls, (const call_t*)(calls + words));
}

static void run_part(void* args, int index) { run_call(call_after(args, index)); }
