/* AdamW (arXiv:1711.05101) on n elements of a weight, in place */
typedef struct { float OPTIONS; } adamw_options_t; /* options.py has the names */

HOT void adamw_step(float* p, float* m, float* v, const float* grad, const adamw_options_t* o,
                    long n) {
  const float lr = o->learning_rate, beta1 = o->beta1, beta2 = o->beta2, eps = o->eps;
  const float decay = o->weight_decay, scale = o->grad_scale;
  const float debias1 = o->bias_correction1, debias2 = o->bias_correction2;
  for (long i = 0; i < n; i++) {
    const float x = grad[i] * scale;
    m[i] = beta1 * m[i] + (1.f - beta1) * x;
    v[i] = beta2 * v[i] + (1.f - beta2) * x * x;
    p[i] = p[i] * (1.f - lr * decay)
         - lr * (m[i] * debias1) / (__builtin_sqrtf(v[i] * debias2) + eps);
  }
}
