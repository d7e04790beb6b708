/* What a warp does together with matrices of 16-bit numbers (NVIDIA's PTX manual: mma, ldmatrix,
 * cp.async). */
#ifndef EMULATED
DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

/* c (16, 8) += a (16, 16) b (16, 8) */
DEVICE void multiply(float* c, const unsigned* a, const unsigned* b, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply(float* c, const unsigned* a, const unsigned* b, f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four matrices (8, 8) from shared memory; lanes 8 i to 8 i + 7 bring the rows of matrix i. */
DEVICE void load_matrices(unsigned* x, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_transposed(unsigned* x, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row))
               : "memory");
}

/* 16 bytes into shared memory, zeros unless `there`; visible after wait_for_copies and a barrier */
DEVICE void copy_later(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* until at most `left` groups of copies are under way */
template <int left> DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}
#endif
