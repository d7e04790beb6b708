/* The sum of squares of x[first .. last) */
HOT double square_sum(const float* x, long first, long last) {
  double total = 0;
  for (long i = first; i < last; i += 1024) {
    const long end = MIN(i + 1024, last);
    vfloat sum[2] = {(vfloat)0.f, (vfloat)0.f};
    long j = i;
    for (; j + 2 * LANES <= end; j += 2 * LANES)
      UNROLL for (int u = 0; u < 2; u++) sum[u] += LOAD(x + j + u * LANES) * LOAD(x + j + u * LANES);
    float some = vsum(sum[0] + sum[1]);
    for (; j < end; j++) some += x[j] * x[j];
    total += some;
  }
  return total;
}
