// Every row's own adapters: shrink by token blocks, then expand by columns.

template <int N, class T>
void shrink_block(const Adapters<T>& p, const Segment& s, int first) {
  const T* xs[N];
  for (int j = 0; j < N; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
  for (int k = 0; k < s.rank; k++) {
    float out[N];
    dots<N>(p.memory + s.extent->a + long(k) * p.in, xs, p.in, out);
    for (int j = 0; j < N; j++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + k] = p.weights[first + j] * out[j];
  }
}

// (g − 1) · base + (b − bias) of one column.
template <class T>
inline float shift(const Adapters<T>& p, const Segment& s, long token, int column) {
  float total = 0;
  if (s.extent->gain >= 0)
    total += (p.vectors[s.extent->gain + column] - 1) * value(p.base[token * p.out + column]);
  if (s.extent->bias >= 0)
    total += p.vectors[s.extent->bias + column] - (p.bias ? value(p.bias[column]) : 0.f);
  return total;
}

template <int N, class T>
void expand_block(const Adapters<T>& p, const Segment& s, int first, int column, int width) {
  const float* hidden[N];
  float sums[N][WIDE];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const float* rows = p.memory + s.extent->b + column;
  combine<N>(hidden, s.rank, width, [&](int k) { return rows + long(k) * p.out; }, sums);
  for (int j = 0; j < N; j++) {
    const long token = p.tokens[first + j];
    float* y = p.sums + token * p.out + column;
    for (int c = 0; c < width; c++) y[c] += sums[j][c];
    if (s.extent->gain >= 0 || s.extent->bias >= 0)
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
