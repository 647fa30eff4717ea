// Kernel bodies, compiled once for every instruction set by cpu.cpp. No include guard on purpose.
//
// A value never depends on the block it was computed in: every sum runs over one token's own
// elements in one fixed order, so a row's result is bit-equal whatever rows stand beside it.

constexpr int LANES = VECTOR_BYTES / 4;  // floats of a vector
constexpr int WIDE = 2 * LANES;  // floats a step; two vectors keep both multipliers busy
constexpr int TOKENS = 4;  // tokens (or query heads) that share each load
constexpr long MIN_PARALLEL_WORK = 1 << 16;  // multiplications below which a second thread costs more

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t bits32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t bits16 __attribute__((vector_size(VECTOR_BYTES / 2)));

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {  // round to nearest even, keep NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline vec load(const float* from) {
  vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline vec load(const bf16* from) {
  bits16 narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const bits32 wide = __builtin_convertvector(narrow, bits32) << 16;
  vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
template <class T>
inline vec load_part(const T* from, int width) {
  vec v = {};
  for (int i = 0; i < width; i++) v[i] = value(from[i]);
  return v;
}
inline float sum(vec v) {
  float parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// out[j] = row · xs[j] for N vectors of length n.
template <int N, class W, class T>
inline void dots(const W* row, const T* const* xs, int n, float* out) {
  vec even[N] = {}, odd[N] = {};
  int i = 0;
  for (; i + WIDE <= n; i += WIDE) {
    const vec first = load(row + i), second = load(row + i + LANES);
    for (int j = 0; j < N; j++) even[j] += first * load(xs[j] + i);
    for (int j = 0; j < N; j++) odd[j] += second * load(xs[j] + i + LANES);
  }
  for (; i < n; i += LANES) {
    const int width = std::min(LANES, n - i);
    const vec first = load_part(row + i, width);
    for (int j = 0; j < N; j++) even[j] += first * load_part(xs[j] + i, width);
  }
  for (int j = 0; j < N; j++) out[j] = sum(even[j] + odd[j]);
}

// sums[j][0:width] = Σ_k scales[j][k] · row(k)[0:width] for N sets of scales and `width` ≤ WIDE.
template <int N, class Row>
inline void combine(const float* const* scales, int count, int width, Row row, float (*sums)[WIDE]) {
  vec left[N] = {}, right[N] = {};
  if (width == WIDE)
    for (int k = 0; k < count; k++) {
      const vec first = load(row(k)), second = load(row(k) + LANES);
      for (int j = 0; j < N; j++) left[j] += scales[j][k] * first;
      for (int j = 0; j < N; j++) right[j] += scales[j][k] * second;
    }
  else
    for (int k = 0; k < count; k++) {
      const vec first = load_part(row(k), std::min(width, LANES));
      const vec second = load_part(row(k) + LANES, width - LANES);
      for (int j = 0; j < N; j++) left[j] += scales[j][k] * first;
      for (int j = 0; j < N; j++) right[j] += scales[j][k] * second;
    }
  for (int j = 0; j < N; j++) {
    std::memcpy(sums[j], &left[j], sizeof(vec));
    std::memcpy(sums[j] + LANES, &right[j], sizeof(vec));
  }
}

// y[t][0:width] = Σ_k x[t][k] · panel[k][0:WIDE] for N tokens: the product with WIDE outputs.
template <int N>
inline void product_block(const float* x, long x_stride, const float* panel, int in, float* y,
                          long y_stride, int width) {
  vec left[N] = {}, right[N] = {};
  for (int k = 0; k < in; k++) {
    const vec first = load(panel + long(k) * WIDE), second = load(panel + long(k) * WIDE + LANES);
    for (int j = 0; j < N; j++) {
      left[j] += x[j * x_stride + k] * first;
      right[j] += x[j * x_stride + k] * second;
    }
  }
  for (int j = 0; j < N; j++) {
    float row[WIDE];
    std::memcpy(row, &left[j], sizeof(vec));
    std::memcpy(row + LANES, &right[j], sizeof(vec));
    std::memcpy(y + j * y_stride, row, width * sizeof(float));
  }
}

// y = x Wᵀ with W in panels: (out / WIDE, in, WIDE), the last one padded with zeros.
inline void product(const Product& p, int num_threads) {
  constexpr int ROWS = 6;  // 2 · ROWS sums and two weights fill the registers
  const long panel_size = long(p.in) * WIDE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int column = 0; column < p.out; column += WIDE) {
    const float* panel = p.panels + column / WIDE * panel_size;
    const int width = std::min(WIDE, p.out - column);
    int t = 0;
    for (; t + ROWS <= p.num_tokens; t += ROWS)
      product_block<ROWS>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
    for (; t + 2 <= p.num_tokens; t += 2)
      product_block<2>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
    for (; t < p.num_tokens; t++)
      product_block<1>(p.x + long(t) * p.in, p.in, panel, p.in, p.y + long(t) * p.out + column, p.out, width);
  }
}

template <int N, class T>
void shrink_block(const Adapters<T>& p, const Segment& s, int first) {
  const T* xs[N];
  for (int j = 0; j < N; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
  for (int k = 0; k < s.rank; k++) {
    float out[N];
    dots<N>(p.a + long(s.start + k) * p.in, xs, p.in, out);
    for (int j = 0; j < N; j++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + k] = p.weights[first + j] * out[j];
  }
}

// (g − 1) · base + (b − bias) of one column.
template <class T>
inline float shift(const Adapters<T>& p, const Segment& s, long token, int column) {
  float total = 0;
  if (s.gain >= 0)
    total += (p.gains[long(s.gain) * p.out + column] - 1) * value(p.base[token * p.out + column]);
  if (s.bias >= 0)
    total += p.biases[long(s.bias) * p.out + column] - (p.bias ? value(p.bias[column]) : 0.f);
  return total;
}

template <int N, class T>
void expand_block(const Adapters<T>& p, const Segment& s, int first, int column, int width) {
  const float* hidden[N];
  float sums[N][WIDE];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const float* rows = p.b + long(s.start) * p.out + column;
  combine<N>(hidden, s.rank, width, [&](int k) { return rows + long(k) * p.out; }, sums);
  for (int j = 0; j < N; j++) {
    const long token = p.tokens[first + j];
    float* y = p.sums + token * p.out + column;
    for (int c = 0; c < width; c++) y[c] += sums[j][c];
    if (s.gain >= 0 || s.bias >= 0)
      for (int c = 0; c < width; c++) y[c] += p.weights[first + j] * shift(p, s, token, column + c);
  }
}

template <class T>
void apply_columns(const Adapters<T>& p, int column, int width) {
  for (long t = 0; t < p.num_tokens; t++)
    for (int c = column; c < column + width; c++)
      p.sums[t * p.out + c] = value(p.base[t * p.out + c]) + (p.bias ? value(p.bias[c]) : 0.f);
  for (const Segment& s : *p.segments) {
    int first = s.first;
    for (; first + TOKENS <= s.last; first += TOKENS)
      for (int c = column; c < column + width; c += WIDE)
        expand_block<TOKENS>(p, s, first, c, std::min(WIDE, column + width - c));
    for (; first < s.last; first++)
      for (int c = column; c < column + width; c += WIDE)
        expand_block<1>(p, s, first, c, std::min(WIDE, column + width - c));
  }
  if (reinterpret_cast<void*>(p.y) != reinterpret_cast<void*>(p.sums))
    for (long t = 0; t < p.num_tokens; t++)
      for (int c = column; c < column + width; c++) store(p.y + t * p.out + c, p.sums[t * p.out + c]);
}

template <class T>
void apply_adapters(const Adapters<T>& p, int num_threads) {
  static thread_local std::vector<Block> own;
  own.clear();
  long work = p.num_tokens * p.out;
  for (const Segment& s : *p.segments) {
    work += long(s.last - s.first) * s.rank * (p.in + p.out);
    for (int first = s.first; first < s.last; first += TOKENS) own.push_back({&s, first});
  }
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
  const std::vector<Block>& blocks = own;  // the caller's, seen by every thread
  const int share = (p.out + num_threads * WIDE - 1) / (num_threads * WIDE) * WIDE;  // columns each
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); i++) {
      const Segment& s = *blocks[i].segment;
      int first = blocks[i].first;
      if (first + TOKENS <= s.last) shrink_block<TOKENS>(p, s, first);
      else for (; first < s.last; first++) shrink_block<1>(p, s, first);
    }
#pragma omp for schedule(static)
    for (int column = 0; column < p.out; column += share)
      apply_columns(p, column, std::min(share, p.out - column));
  }
}

// exp(x) for x ≤ 0 within 2 ulp; 0 below -87; NaN stays (Cephes' polynomial).
inline float exp_negative(float x) {
  const float y = x >= -87.f ? x : -87.f;
  const float n = std::floor(y * 1.44269504f + 0.5f);
  const float r = y - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  const float e = (p * r * r + r + 1) * scale;
  return x >= -87.f ? e : x != x ? x : 0.f;
}

// scores[0:count] → unnormalised softmax weights; returns their sum. NaN or ∞ gives NaN.
template <class T>
inline float soften(const Attention<T>& p, float* scores, int count) {
  float largest = -INFINITY, total = 0;
  if (p.softcap > 0)
    for (int i = 0; i < count; i++) scores[i] = p.softcap * std::tanh(scores[i] / p.softcap);
  for (int i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
  for (int i = 0; i < count; i++) scores[i] = exp_negative(scores[i] - largest);
  for (int i = 0; i < count; i++) total += scores[i];
  return total;
}

// N query heads of one token that share a key-value head, over `count` cached positions.
template <int N, class T>
void attend(const Attention<T>& p, const T* q, T* out, const long* slots, int count, float* buffer) {
  const T* queries[N];
  float* scores[N];
  float totals[N];
  for (int j = 0; j < N; j++) queries[j] = q + long(j) * p.head_dim;
  for (int j = 0; j < N; j++) scores[j] = buffer + long(j) * count;
  for (int i = 0; i < count; i++) {
    float found[N];
    dots<N>(p.keys + slots[i], queries, p.head_dim, found);
    for (int j = 0; j < N; j++) scores[j][i] = found[j] * p.scale;
  }
  for (int j = 0; j < N; j++) totals[j] = soften(p, scores[j], count);
  for (int d = 0; d < p.head_dim; d += WIDE) {
    const int width = std::min(WIDE, p.head_dim - d);
    float sums[N][WIDE];
    combine<N>(scores, count, width, [&](int i) { return p.values + slots[i] + d; }, sums);
    for (int j = 0; j < N; j++)
      for (int c = 0; c < width; c++) store(out + long(j) * p.head_dim + d + c, sums[j][c] / totals[j]);
  }
}

template <class T>
void attend_token(const Attention<T>& p, int token, int kv_head, long* slots, float* buffer) {
  const int end = p.positions[token] + 1, begin = p.window > 0 ? std::max(0, end - p.window) : 0;
  const int32_t* table = p.tables + long(p.rows[token]) * p.table_width;
  for (int i = begin; i < end; i++) {
    const long slot = long(table[i / p.block_size]) * p.block_size + i % p.block_size;
    slots[i - begin] = (slot * p.num_kv_heads + kv_head) * p.head_dim;
  }
  const int group = p.num_heads / p.num_kv_heads;
  const long at = (long(token) * p.num_heads + kv_head * group) * p.head_dim;
  int head = 0;
  for (; head + TOKENS <= group; head += TOKENS)
    attend<TOKENS>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
  for (; head + 3 <= group; head += 3)
    attend<3>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
  for (; head < group; head++)
    attend<1>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
}

template <class T>
void paged_attention(const Attention<T>& p, int num_threads) {
  const long work = long(p.num_tokens) * p.num_heads * p.head_dim * p.block_size;
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<long> slots(long(p.table_width) * p.block_size);
    std::vector<float> buffer(TOKENS * slots.size());
#pragma omp for schedule(dynamic, 4)
    for (int task = 0; task < p.num_tokens * p.num_kv_heads; task++)
      attend_token(p, task / p.num_kv_heads, task % p.num_kv_heads, slots.data(), buffer.data());
  }
}
