/* ---- The model. Each function takes the same names as the layer in gpt.py; comments give shapes:
 *
 *     T tokens that are read at once     K inputs, N outputs of a linear layer
 *     D head size                        p position of a token in the text
 */

enum {
  Q_SIZE = N_HEAD * HEAD_SIZE,           /* numbers of all queries of a token */
  KV_SIZE = N_KV_HEAD * HEAD_SIZE        /* of all its keys, and of all its values */
};

struct norm { const float *weight, *bias; };   /* no bias: 0 */

/* weight has ceil(N / PANEL) panels of K inputs; scale (N) or 0, bias (N) or 0 */
struct linear { int K, N; const weight_t *weight; const float *scale, *bias; };

struct block {
  struct norm ln_1, q_norm, k_norm, ln_2;
  struct linear c_attn, attn_proj, c_fc, c_gate, mlp_proj;
};

static struct {
  struct linear lm_head;
  const float *wte, *wpe;    /* (VOCAB_SIZE, N_EMBD), 0 if tied to lm_head; (BLOCK_SIZE, N_EMBD) */
  const float *cos, *sin;    /* (BLOCK_SIZE, D / 2) of RoPE's angles */
  struct block h[N_LAYER];
  struct norm ln_f;
} model;

/* what the steps compute, of up to CHUNK tokens */
static float x[CHUNK][N_EMBD];           /* the residual stream */
static float normed[CHUNK][N_EMBD];
static float qkv[CHUNK][Q_SIZE + 2 * KV_SIZE];
static float heads[CHUNK][Q_SIZE];       /* the outputs of the heads */
static float inner[CHUNK][N_INNER], gate[CHUNK][N_INNER];
static float keys[N_LAYER][N_KV_HEAD][HEAD_SIZE][BLOCK_SIZE];
static float values[N_LAYER][N_KV_HEAD][BLOCK_SIZE][HEAD_SIZE];
float attention[N_LAYER][N_HEAD][BLOCK_SIZE];   /* how the last token weighs each position */
float logits[VOCAB_SIZE];

/* ---- reading the weights, in the order in which tinygpt/export/program.py writes them */

static const char *unread;   /* the rest of the file */

static const void *take(size_t bytes) {
  const char *here = unread;
  unread += bytes;
  return here;
}

static const float *take_floats(size_t count) { return take(count * sizeof(float)); }

static struct norm take_norm(int size, int has_bias) {
  struct norm norm = {take_floats(size), 0};
  if (has_bias) norm.bias = take_floats(size);
  return norm;
}

static struct linear take_linear(int N, int K, int has_bias) {
  struct linear linear = {.K = K, .N = N};
  linear.weight = take((size_t)(N + PANEL - 1) / PANEL * panel_size(K) * sizeof(weight_t));
  if (HAS_SCALE) linear.scale = take_floats(N);
  if (has_bias) linear.bias = take_floats(N);
  return linear;
}

static void take_block(struct block *b) {
  const int norm_bias = BIAS && !RMS_NORM;
  b->ln_1 = take_norm(N_EMBD, norm_bias);
  b->c_attn = take_linear(Q_SIZE + 2 * KV_SIZE, N_EMBD, QKV_BIAS);
  if (QK_NORM) b->q_norm = take_norm(HEAD_SIZE, 0);
  if (QK_NORM) b->k_norm = take_norm(HEAD_SIZE, 0);
  b->attn_proj = take_linear(N_EMBD, Q_SIZE, BIAS);
  if (!PARALLEL) b->ln_2 = take_norm(N_EMBD, norm_bias);
  b->c_fc = take_linear(N_INNER, N_EMBD, BIAS);
  if (SWIGLU) b->c_gate = take_linear(N_INNER, N_EMBD, BIAS);
  b->mlp_proj = take_linear(N_EMBD, N_INNER, BIAS);
}

static void take_model(const char *file) {
  unread = file;
  model.lm_head = take_linear(VOCAB_SIZE, N_EMBD, 0);
  if (!TIE_WEIGHTS) model.wte = take_floats((size_t)VOCAB_SIZE * N_EMBD);
  if (!ROPE) model.wpe = take_floats((size_t)BLOCK_SIZE * N_EMBD);
  if (ROPE) model.cos = take_floats((size_t)BLOCK_SIZE * HEAD_SIZE / 2);
  if (ROPE) model.sin = take_floats((size_t)BLOCK_SIZE * HEAD_SIZE / 2);
  for (int i = 0; i < N_LAYER; i++) take_block(&model.h[i]);
  model.ln_f = take_norm(N_EMBD, BIAS && !RMS_NORM);
}

/* ---- the layers */

/* y (count) = the products of outputs n, n + 1, ... scaled, plus the bias, plus y if `add` */
static void finish(float *restrict y, const float *restrict products, int n, int count,
                   const struct linear *l, int add) {
  for (int i = 0; i < count; i++) {
    const float product = HAS_SCALE ? products[i] * l->scale[n + i] : products[i];
    y[i] = add ? product + y[i] : product;
  }
  if (l->bias)
    for (int i = 0; i < count; i++) y[i] += l->bias[n + i];
}

/* y (T, N) = x (T, K) times the weights, plus the bias, plus y if `add` */
static void linear(float *y, const float *x, int T, const struct linear *l, int add) {
  static float products[CHUNK][PANEL];
  const input_t *inputs = prepare(x, T, l->K);
  const weight_t *panel = l->weight;
  for (int n = 0; n < l->N; n += PANEL, panel += panel_size(l->K)) {
    const int count = l->N - n < PANEL ? l->N - n : PANEL;
    multiply_rows(products, inputs, T, panel, l->K);
    for (int t = 0; t < T; t++) finish(y + (size_t)t * l->N + n, products[t], n, count, l, add);
  }
}

/* y (n) = LayerNorm or RMSNorm of x (n); y may be x */
static void norm(float *y, const float *x, const struct norm *l, int n, int rms) {
  const float mean = rms ? 0.f : sum_of(x, n) / n;
  for (int i = 0; i < n; i++) y[i] = x[i] - mean;
  const float scale = 1.f / __builtin_sqrtf(dot(y, y, n) / n + NORM_EPS);
  for (int i = 0; i < n; i++) y[i] = y[i] * scale * l->weight[i] + (l->bias ? l->bias[i] : 0.f);
}

/* the last of every NO_ROPE_INTERVAL layers has no RoPE; 0: all have it */
static int rotates(int layer) {
  return ROPE && !(NO_ROPE_INTERVAL && (layer + 1) % NO_ROPE_INTERVAL == 0);
}

/* turns the pairs (i, i + D/2) of a head (D) by the angles of position p */
static void rope(float *head, int p) {
  enum { HALF = HEAD_SIZE / 2 };
  for (int i = 0; i < HALF; i++) {
    const float cos = model.cos[p * HALF + i], sin = model.sin[p * HALF + i];
    const float a = head[i], b = head[i + HALF];
    head[i] = a * cos - b * sin;
    head[i + HALF] = b * cos + a * sin;
  }
}

/* stores the key and value of a token at position p */
static void remember(int layer, int p, const float *k, const float *v) {
  for (int g = 0; g < N_KV_HEAD; g++)
    for (int d = 0; d < HEAD_SIZE; d++) {
      keys[layer][g][d][p] = k[g * HEAD_SIZE + d];
      values[layer][g][p][d] = v[g * HEAD_SIZE + d];
    }
}

/* out (D) = the values up to position p, weighted by how q (D) fits their keys */
VECTORIZED
static void attend(float *restrict out, const float *restrict q, int layer, int head, int p) {
  const int g = head / (N_HEAD / N_KV_HEAD);
  const int first = WINDOW && p >= WINDOW ? p + 1 - WINDOW : 0;
  float *restrict weights = attention[layer][head];
  for (int j = 0; j <= p; j++) weights[j] = 0.f;
  for (int d = 0; d < HEAD_SIZE; d++) {
    const float scaled = q[d] / __builtin_sqrtf(HEAD_SIZE);
    for (int j = first; j <= p; j++) weights[j] += scaled * keys[layer][g][d][j];
  }
  softmax(weights + first, weights + first, p + 1 - first);
  for (int d = 0; d < HEAD_SIZE; d++) out[d] = 0.f;
  for (int j = first; j <= p; j++)
    for (int d = 0; d < HEAD_SIZE; d++) out[d] += weights[j] * values[layer][g][j][d];
}

/* causal self-attention of a token: its query, key and value -> the outputs of its heads */
static void self_attention(float *out, float *qkv, const struct block *b, int layer, int p) {
  float *q = qkv, *k = q + Q_SIZE, *v = k + KV_SIZE;
  for (int i = 0; i < N_HEAD; i++) {
    if (QK_NORM) norm(q + i * HEAD_SIZE, q + i * HEAD_SIZE, &b->q_norm, HEAD_SIZE, 1);
    if (rotates(layer)) rope(q + i * HEAD_SIZE, p);
  }
  for (int i = 0; i < N_KV_HEAD; i++) {
    if (QK_NORM) norm(k + i * HEAD_SIZE, k + i * HEAD_SIZE, &b->k_norm, HEAD_SIZE, 1);
    if (rotates(layer)) rope(k + i * HEAD_SIZE, p);
  }
  remember(layer, p, k, v);
  for (int i = 0; i < N_HEAD; i++) attend(out + i * HEAD_SIZE, q + i * HEAD_SIZE, layer, i, p);
}

/* h (n) = activation(h), with swiglu silu(gate) * h */
VECTORIZED
static void activate(float *restrict h, const float *restrict gate, int n) {
  for (int i = 0; i < n; i++)
    h[i] = SWIGLU ? gate[i] * sigmoid(gate[i]) * h[i] : GELU_TANH ? gelu_tanh(h[i]) : gelu(h[i]);
}

/* x += attention(norm(x)); x += MLP(norm(x)), of T tokens from position p on */
static void block(const struct block *b, int layer, int T, int p) {
  for (int t = 0; t < T; t++) norm(normed[t], x[t], &b->ln_1, N_EMBD, RMS_NORM);
  linear(qkv[0], normed[0], T, &b->c_attn, 0);
  for (int t = 0; t < T; t++) self_attention(heads[t], qkv[t], b, layer, p + t);
  linear(x[0], heads[0], T, &b->attn_proj, 1);
  if (!PARALLEL)
    for (int t = 0; t < T; t++) norm(normed[t], x[t], &b->ln_2, N_EMBD, RMS_NORM);
  linear(inner[0], normed[0], T, &b->c_fc, 0);
  if (SWIGLU) linear(gate[0], normed[0], T, &b->c_gate, 0);
  activate(inner[0], gate[0], T * N_INNER);
  linear(x[0], inner[0], T, &b->mlp_proj, 1);
}

/* x (C) = the embedding of a token at position p */
static void embed(float *x, int token, int p) {
  const struct linear *l = &model.lm_head;
  const weight_t *panel = l->weight + (size_t)(token / PANEL) * panel_size(N_EMBD);
  for (int i = 0; i < N_EMBD; i++) {
    if (TIE_WEIGHTS)
      x[i] = weight_of(panel, i, token % PANEL) * (HAS_SCALE ? l->scale[token] : 1.f);
    else
      x[i] = model.wte[(size_t)token * N_EMBD + i];
    if (!ROPE) x[i] += model.wpe[(size_t)p * N_EMBD + i];
  }
}

/* Reads T tokens at positions p, p + 1, ..., those before which have been read: the logits of the
 * token that follows them. */
static void read_tokens(const int32_t *tokens, int T, int p) {
  for (int t = 0; t < T; t++) embed(x[t], tokens[t], p + t);
  for (int layer = 0; layer < N_LAYER; layer++) block(&model.h[layer], layer, T, p);
  norm(normed[0], x[T - 1], &model.ln_f, N_EMBD, RMS_NORM);
  linear(logits, normed[0], 1, &model.lm_head, 0);
}
