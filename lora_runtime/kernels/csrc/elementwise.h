// What stands between the products: norms, rotation and the write of keys and values, activation.

constexpr int ROWS_AT_A_TIME = 4;  // of a thread

// x / √(mean x² + eps), rounded, times weight; or with plus_one times (1 + weight), rounded once.
template <class T>
inline void norm_row(const T* x, const T* weight, T* y, int width, float eps, bool plus_one) {
  vec squares = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    const vec v = load(x + i);
    squares += v * v;
  }
  if (i < width) {
    const vec v = load_part(x + i, width - i);
    squares += v * v;
  }
  const float scale = 1.f / std::sqrt(sum(squares) / width + eps);
  for (i = 0; i < width; i++) {
    const float normed = value(x[i]) * scale;
    T rounded;
    store(&rounded, normed);
    store(y + i, plus_one ? normed * (1.f + value(weight[i])) : value(rounded) * value(weight[i]));
  }
}

template <class T>
inline void rms_norm_row(const Norm<T>& p, int row) {
  const long at = long(row) * p.width;
  const T* x = p.x + at;
  if (p.residual) {
    T* total = p.total + at;
    if (p.branch_weight) {
      norm_row(x, p.branch_weight, total, p.width, p.eps, p.plus_one);
      x = total;
    }
    for (int i = 0; i < p.width; i++) store(total + i, value(p.residual[at + i]) + value(x[i]));
    x = total;
  }
  norm_row(x, p.weight, p.y + at, p.width, p.eps, p.plus_one);
}

template <class T>
void rms_norm(const Norm<T>& p, int num_threads) {
  if (long(p.num_rows) * p.width < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (int row = int(begin); row < end; row++) rms_norm_row(p, row);
  });
}

// One head: normed if there is a weight, then rotated. `buffer` holds a head.
template <class T>
inline void rotate_head(const Rotation<T>& p, const T* x, const T* weight, long token, T* y, T* buffer) {
  if (weight) {
    norm_row(x, weight, buffer, p.head_dim, p.eps, p.plus_one);
    x = buffer;
  }
  const T *cos = p.cos + token * p.rotated, *sin = p.sin + token * p.rotated;
  const int half = p.rotated / 2;
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vec first = load(x + i), second = load(x + half + i);
    store(y + i, fused(-(second * load(sin + i)), first, load(cos + i)));
    store(y + half + i, fused(first * load(sin + half + i), second, load(cos + half + i)));
  }
  for (; i < half; i++) {
    const float first = value(x[i]), second = value(x[half + i]);
    store(y + i, first * value(cos[i]) - second * value(sin[i]));
    store(y + half + i, second * value(cos[half + i]) + first * value(sin[half + i]));
  }
  for (i = 2 * half; i < p.head_dim; i++) y[i] = x[i];
}

template <class T>
inline void rotate_row(const Rotation<T>& p, int token) {
  static thread_local std::vector<T> buffer;
  buffer.resize(p.head_dim);
  const T *q = p.q + token * p.q_stride, *k = p.k + token * p.k_stride;
  for (int head = 0; head < p.num_heads; head++)
    rotate_head(p, q + head * p.head_dim, p.q_weight, token,
                p.q_out + (long(token) * p.num_heads + head) * p.head_dim, buffer.data());
  const long slot = p.slots ? p.slots[token] : token, width = long(p.num_kv_heads) * p.head_dim;
  if (slot < 0) return;
  for (int head = 0; head < p.num_kv_heads; head++)
    rotate_head(p, k + head * p.head_dim, p.k_weight, token,
                p.k_out + slot * width + head * p.head_dim, buffer.data());
  if (p.v) std::memcpy(p.v_out + slot * width, p.v + token * p.v_stride, width * sizeof(T));
}

template <class T>
void rotate(const Rotation<T>& p, int num_threads) {
  const long per_token = long(p.num_heads + p.num_kv_heads) * p.head_dim;
  if (per_token * p.num_tokens < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_tokens, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (int token = int(begin); token < end; token++) rotate_row(p, token);
  });
}

// found[row] = (the first column of the largest value, 1 if all are finite).
template <class T>
inline void most_likely_row(const T* x, int64_t* found, int width, int row) {
  constexpr int PART = 64 * LANES;
  const T* values = x + long(row) * width;
  float best = -INFINITY;
  int part_of_best = 0;
  ints is_bad = {};
  for (int begin = 0; begin < width; begin += PART) {
    vec largest = vec{} - INFINITY;
    const int end = std::min(begin + PART, width);
    for (int i = begin; i < end; i += LANES) {
      const int left = end - i;
      const vec v = left >= LANES ? load(values + i) : load_part(values + i, left);
      const ints bits = (ints)v & 0x7f800000;
      is_bad |= bits == 0x7f800000;  // ∞ or NaN
      if (left >= LANES) largest = v > largest ? v : largest;
      else for (int c = 0; c < left; c++) largest[0] = std::max(largest[0], v[c]);
    }
    float most = largest[0];
    for (int l = 1; l < LANES; l++) most = std::max(most, largest[l]);
    if (most > best) best = most, part_of_best = begin;
  }
  int column = part_of_best;
  while (column < width - 1 && !(value(values[column]) == best)) column++;
  int bad = 0;
  for (int l = 0; l < LANES; l++) bad |= is_bad[l];
  found[2L * row] = column;
  found[2L * row + 1] = !bad;
}

template <class T>
void most_likely(const T* x, int64_t* found, int num_rows, int width, int num_threads) {
  if (long(num_rows) * width < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (int row = int(begin); row < end; row++) most_likely_row(x, found, width, row);
  });
}

inline vec silu(vec x) {
  const vec e = exp_negative(x < 0 ? x : -x);
  return x * (x < 0 ? e : vec{} + 1.f) / (1.f + e);
}

constexpr float GELU_SCALE = 0.7978845608f, GELU_CUBE = 0.044715f;

inline vec tanh_of_gelu(vec x) {
  const vec inner = GELU_SCALE * (x + GELU_CUBE * x * x * x);
  const vec e = exp_negative(inner < 0 ? 2 * inner : -2 * inner), tanh = (1.f - e) / (1.f + e);
  return inner < 0 ? -tanh : tanh;
}

inline vec gelu_tanh(vec x) { return 0.5f * x * (1.f + tanh_of_gelu(x)); }

template <class T>
inline void gated_activation_row(const Gated<T>& p, int row) {
  const T *gate = p.gate + row * p.gate_stride, *up = p.up + row * p.up_stride;
  T* y = p.y + long(row) * p.width;
  for (int i = 0; i < p.width; i += LANES) {
    const int width = std::min(LANES, p.width - i);
    const vec x = width == LANES ? load(gate + i) : load_part(gate + i, width);
    const vec factor = width == LANES ? load(up + i) : load_part(up + i, width);
    const vec found = (p.is_gelu ? gelu_tanh(x) : silu(x)) * factor;
    if (width == LANES) store(y + i, found);
    else for (int c = 0; c < width; c++) store(y + i + c, found[c]);
  }
}

template <class T>
void gated_activation(const Gated<T>& p, int num_threads) {
  if (long(p.num_rows) * p.width < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (int row = int(begin); row < end; row++) gated_activation_row(p, row);
  });
}

// y[t] = Σ_k weights[t][k] · x[places[t][k]], the sum in the order of k.
template <class T>
inline void sum_pairs_row(const PairSum<T>& p, int row) {
  const int64_t* places = p.places + long(row) * p.per_token;
  const float* weights = p.weights + long(row) * p.per_token;
  T* y = p.y + long(row) * p.width;
  for (int i = 0; i < p.width; i += LANES) {
    const int width = std::min(LANES, p.width - i);
    vec total = {};
    for (int k = 0; k < p.per_token; k++) {
      const T* from = p.x + places[k] * p.width + i;
      total = fused(total, weights[k], width == LANES ? load(from) : load_part(from, width));
    }
    if (width == LANES) store(y + i, total);
    else for (int c = 0; c < width; c++) store(y + i + c, total[c]);
  }
}

template <class T>
void sum_pairs(const PairSum<T>& p, int num_threads) {
  if (long(p.num_rows) * p.width * p.per_token < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(p.num_rows, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (int row = int(begin); row < end; row++) sum_pairs_row(p, row);
  });
}
