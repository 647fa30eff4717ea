// Gradients of what stands between the products. What forward can give again for less than it costs
// to read is computed again; inside all is float32, rounded once.

template <class T>
inline vec load_up_to(const T* from, int width) { return width >= LANES ? load(from) : load_part(from, width); }
template <class T>
inline void store_up_to(T* to, vec x, int width) {
  if (width >= LANES) return store(to, x);
  for (int i = 0; i < width; i++) store(to + i, x[i]);
}

// y = w n, n = s x, s = 1 / √(mean x² + eps), gives dx = s (g w − n mean(g w n)) + other.
template <class T, class G>
inline void norm_row_gradient(T* dx, const G* grad, const T* other, const T* x, const T* weight, int width,
                              float eps, bool plus_one) {
  const float one = plus_one;
  vec squares = {}, products = {};
  for (int i = 0; i < width; i += LANES) {
    const int left = width - i;
    const vec v = load_up_to(x + i, left), g = load_up_to(grad + i, left) * (load_up_to(weight + i, left) + one);
    squares += v * v;
    products += g * v;
  }
  const float scale = 1.f / std::sqrt(sum(squares) / width + eps);
  const float pull = sum(products) / width * scale * scale * scale;
  for (int i = 0; i < width; i += LANES) {
    const int left = width - i;
    const vec v = load_up_to(x + i, left), g = load_up_to(grad + i, left) * (load_up_to(weight + i, left) + one);
    vec found = scale * g - pull * v;
    if (other) found += load_up_to(other + i, left);
    store_up_to(dx + i, found, left);
  }
}

template <class T>
void rms_norm_gradient(const NormGradient<T>& p, int num_threads) {
  if (long(p.num_rows) * p.width < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (long row = begin; row < end; row++) {
      const long at = row * p.width;
      norm_row_gradient(p.dx + at, p.grad + at, p.other ? p.other + at : nullptr, p.x + at, p.weight, p.width,
                        p.eps, p.plus_one);
    }
  });
}

// `to` = the rotation's transpose times one head's gradient.
template <class T, class To>
inline void rotate_head_back(const T* grad, const T* cos, const T* sin, int rotated, int head_dim, To* to) {
  const int half = rotated / 2;
  for (int i = 0; i < half; i += LANES) {
    const int left = half - i;
    const vec first = load_up_to(grad + i, left), second = load_up_to(grad + half + i, left);
    store_up_to(to + i, first * load_up_to(cos + i, left) + second * load_up_to(sin + half + i, left), left);
    store_up_to(to + half + i, second * load_up_to(cos + half + i, left) - first * load_up_to(sin + i, left), left);
  }
  for (int i = 2 * half; i < head_dim; i += LANES) store_up_to(to + i, load_up_to(grad + i, head_dim - i), head_dim - i);
}

// The heads of one token, side by side in x, grad and dx.
template <class T>
inline void rotate_heads_back(const RotationGradient<T>& p, const T* grad, const T* x, const T* weight, long token,
                              int num_heads, T* dx) {
  static thread_local std::vector<float> turned;
  turned.resize(p.head_dim);
  const T *cos = p.cos + token * p.rotated, *sin = p.sin + token * p.rotated;
  for (int head = 0; head < num_heads; head++) {
    const long at = long(head) * p.head_dim;
    if (!weight) {
      rotate_head_back(grad + at, cos, sin, p.rotated, p.head_dim, dx + at);
      continue;
    }
    rotate_head_back(grad + at, cos, sin, p.rotated, p.head_dim, turned.data());
    norm_row_gradient<T, float>(dx + at, turned.data(), nullptr, x + at, weight, p.head_dim, p.eps, p.plus_one);
  }
}

template <class T>
void rotate_gradient(const RotationGradient<T>& p, int num_threads) {
  const long q_width = long(p.num_heads) * p.head_dim, k_width = long(p.num_kv_heads) * p.head_dim;
  if ((q_width + k_width) * p.num_tokens < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_tokens, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (long t = begin; t < end; t++) {
      rotate_heads_back(p, p.grad_q + t * p.grad_q_stride, p.q + t * p.q_stride, p.q_weight, t, p.num_heads,
                        p.dq + t * q_width);
      rotate_heads_back(p, p.grad_k + t * p.grad_k_stride, p.k + t * p.k_stride, p.k_weight, t, p.num_kv_heads,
                        p.dk + t * k_width);
    }
  });
}

struct Slope { vec value, slope; };  // of an activation at x

inline Slope silu_slope(vec x) {
  const vec e = exp_negative(x < 0 ? x : -x), sigmoid = (x < 0 ? e : vec{} + 1.f) / (1.f + e);
  return {x * sigmoid, sigmoid * (1.f + x * (1.f - sigmoid))};
}

inline Slope gelu_tanh_slope(vec x) {
  const vec tanh = tanh_of_gelu(x), inner_slope = GELU_SCALE * (1.f + 3 * GELU_CUBE * x * x);
  return {0.5f * x * (1.f + tanh), 0.5f * (1.f + tanh) + 0.5f * x * (1.f - tanh * tanh) * inner_slope};
}

template <class T>
inline void gated_gradient_row(const GatedGradient<T>& p, long row) {
  const T *gate = p.gate + row * p.gate_stride, *up = p.up + row * p.up_stride;
  const long at = row * p.width;
  for (int i = 0; i < p.width; i += LANES) {
    const int left = p.width - i;
    const vec x = load_up_to(gate + i, left), g = load_up_to(p.grad + at + i, left);
    const Slope act = p.is_gelu ? gelu_tanh_slope(x) : silu_slope(x);
    store_up_to(p.dgate + at + i, g * load_up_to(up + i, left) * act.slope, left);
    store_up_to(p.dup + at + i, g * act.value, left);
  }
}

template <class T>
void gated_activation_gradient(const GatedGradient<T>& p, int num_threads) {
  if (long(p.num_rows) * p.width < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (long row = begin; row < end; row++) gated_gradient_row(p, row);
  });
}
