// Kernel bodies, compiled once for every instruction set by cpu.cpp. No include guard on purpose.
//
// A value never depends on the block it was computed in: every sum runs over one token's own
// elements in one fixed order, so a row's result is bit-equal whatever rows stand beside it.

constexpr int LANES = 16;  // partial sums of a dot product; columns of an expand block
constexpr int TOKENS = 4;  // tokens that share each load of an adapter row
constexpr long MIN_PARALLEL_WORK = 1 << 16;  // multiplications below which a second thread costs more

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

// out[j] = row · xs[j] for N vectors of length n.
template <class W, class T, int N>
inline void dots(const W* row, const T* const* xs, int n, float* out) {
  float sums[N][LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < N; j++)
      for (int lane = 0; lane < LANES; lane++)
        sums[j][lane] += value(row[i + lane]) * value(xs[j][i + lane]);
  for (int j = 0; j < N; j++) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[j][lane];
    for (int k = i; k < n; k++) sum += value(row[k]) * value(xs[j][k]);
    out[j] = sum;
  }
}

// ys[j][c] += Σ_k hidden[j][k] · rows[k][c] for N tokens and `width` ≤ LANES columns.
template <int N>
inline void expand(float* const* ys, const float* const* hidden, const float* rows, int rank,
                   long stride, int width) {
  float sums[N][LANES] = {};
  if (width == LANES) {
    for (int k = 0; k < rank; k++)
      for (int j = 0; j < N; j++)
        for (int c = 0; c < LANES; c++) sums[j][c] += hidden[j][k] * rows[k * stride + c];
  } else {
    for (int k = 0; k < rank; k++)
      for (int j = 0; j < N; j++)
        for (int c = 0; c < width; c++) sums[j][c] += hidden[j][k] * rows[k * stride + c];
  }
  for (int j = 0; j < N; j++)
    for (int c = 0; c < width; c++) ys[j][c] += sums[j][c];
}

template <class T>
void shrink_block(const Adapters<T>& p, const Segment& s, int first, int count) {
  const T* xs[TOKENS];
  for (int j = 0; j < count; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
  for (int k = 0; k < s.rank; k++) {
    const float* row = p.a + long(s.start + k) * p.in;
    float out[TOKENS];
    if (count == TOKENS) dots<float, T, TOKENS>(row, xs, p.in, out);
    else for (int j = 0; j < count; j++) dots<float, T, 1>(row, xs + j, p.in, out + j);
    for (int j = 0; j < count; j++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + k] = p.weights[first + j] * out[j];
  }
}

template <class T>
void expand_block(const Adapters<T>& p, const Segment& s, int first, int count, int column, int width) {
  float* ys[TOKENS];
  const float* hidden[TOKENS];
  for (int j = 0; j < count; j++) {
    ys[j] = p.sums + long(p.tokens[first + j]) * p.out + column;
    hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  }
  const float* rows = p.b + long(s.start) * p.out + column;
  if (count == TOKENS) expand<TOKENS>(ys, hidden, rows, s.rank, p.out, width);
  else for (int j = 0; j < count; j++) expand<1>(ys + j, hidden + j, rows, s.rank, p.out, width);
  for (int j = 0; j < count; j++)
    for (int c = 0; c < width; c++) {
      float shift = 0;
      const long token = p.tokens[first + j];
      if (s.gain >= 0)
        shift += (p.gains[long(s.gain) * p.out + column + c] - 1) * value(p.base[token * p.out + column + c]);
      if (s.bias >= 0) {
        shift += p.biases[long(s.bias) * p.out + column + c];
        if (p.bias) shift -= value(p.bias[column + c]);
      }
      if (s.gain >= 0 || s.bias >= 0) ys[j][c] += p.weights[first + j] * shift;
    }
}

template <class T>
void apply_columns(const Adapters<T>& p, int column, int width) {
  for (long t = 0; t < p.num_tokens; t++)
    for (int c = column; c < column + width; c++)
      p.sums[t * p.out + c] = value(p.base[t * p.out + c]) + (p.bias ? value(p.bias[c]) : 0.f);
  for (const Segment& s : *p.segments)
    for (int first = s.first; first < s.last; first += TOKENS)
      expand_block(p, s, first, std::min(TOKENS, s.last - first), column, width);
  if (reinterpret_cast<void*>(p.y) != reinterpret_cast<void*>(p.sums))
    for (long t = 0; t < p.num_tokens; t++)
      for (int c = column; c < column + width; c++) store(p.y + t * p.out + c, p.sums[t * p.out + c]);
}

template <class T>
void apply_adapters(const Adapters<T>& p, int num_threads) {
  static thread_local std::vector<Block> blocks;
  blocks.clear();
  long work = p.num_tokens * p.out;
  for (const Segment& s : *p.segments) {
    work += long(s.last - s.first) * s.rank * (p.in + p.out);
    for (int first = s.first; first < s.last; first += TOKENS) blocks.push_back({&s, first});
  }
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
  const std::vector<Block>& shared = blocks;  // the caller's, seen by every thread
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < shared.size(); i++)
      shrink_block(p, *shared[i].segment, shared[i].first,
                   std::min(TOKENS, shared[i].segment->last - shared[i].first));
#pragma omp for schedule(static)
    for (int column = 0; column < p.out; column += LANES)
      apply_columns(p, column, std::min(LANES, p.out - column));
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

// One query head of one token over the cached positions [begin, end) of its row.
template <class T>
void attend(const Attention<T>& p, const int32_t* table, const T* q, T* out, int head, int begin,
            int end, float* scores) {
  const long stride = long(p.num_kv_heads) * p.head_dim;
  auto slot = [&](int j) {
    return (long(table[j / p.block_size]) * p.block_size + j % p.block_size) * stride + head * p.head_dim;
  };
  float largest = -INFINITY;
  for (int j = begin; j < end; j++) {
    float score;
    dots<T, T, 1>(p.keys + slot(j), &q, p.head_dim, &score);
    score *= p.scale;
    if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
    scores[j - begin] = score;
    largest = !(score <= largest) ? score : largest;  // a NaN score stays
  }
  float total = 0;
  for (int j = 0; j < end - begin; j++) scores[j] = exp_negative(scores[j] - largest);
  for (int j = 0; j < end - begin; j++) total += scores[j];
  for (int d = 0; d < p.head_dim; d += LANES) {
    const int width = std::min(LANES, p.head_dim - d);
    float sums[LANES] = {};
    for (int j = begin; j < end; j++) {
      const T* v = p.values + slot(j) + d;
      if (width == LANES) for (int c = 0; c < LANES; c++) sums[c] += scores[j - begin] * value(v[c]);
      else for (int c = 0; c < width; c++) sums[c] += scores[j - begin] * value(v[c]);
    }
    for (int c = 0; c < width; c++) store(out + d + c, sums[c] / total);
  }
}

template <class T>
void paged_attention(const Attention<T>& p, int num_threads) {
  const int group = p.num_heads / p.num_kv_heads;
  const long work = long(p.num_tokens) * p.num_heads * p.head_dim * p.block_size;
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scores(p.table_width * p.block_size);
#pragma omp for schedule(dynamic, 4)
    for (int task = 0; task < p.num_tokens * p.num_heads; task++) {
      const int token = task / p.num_heads, head = task % p.num_heads;
      const int end = p.positions[token] + 1;
      const int begin = p.window > 0 ? std::max(0, end - p.window) : 0;
      const long at = (long(token) * p.num_heads + head) * p.head_dim;
      attend(p, p.tables + long(p.rows[token]) * p.table_width, p.q + at, p.out + at, head / group,
             begin, end, scores.data());
    }
  }
}
