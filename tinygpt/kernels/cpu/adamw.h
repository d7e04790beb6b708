/* AdamW (arXiv:1711.05101) on n elements of a weight, in place. options: learning rate, beta1, beta2,
 * epsilon, weight decay, 1 / (1 - beta1^t), 1 / (1 - beta2^t), scale of the gradient, and 0 where
 * nothing may change. */
HOT void adamw_step(float* p, float* m, float* v, const float* grad, const float* options, long n) {
  const float lr = options[0], beta1 = options[1], beta2 = options[2], eps = options[3];
  const float decay = options[4], debias1 = options[5], debias2 = options[6], scale = options[7];
  for (long i = 0; i < n; i++) {
    const float x = grad[i] * scale;
    m[i] = beta1 * m[i] + (1.f - beta1) * x;
    v[i] = beta2 * v[i] + (1.f - beta2) * x * x;
    p[i] = p[i] * (1.f - lr * decay)
         - lr * (m[i] * debias1) / (__builtin_sqrtf(v[i] * debias2) + eps);
  }
}
