// Every row's own adapters: shrink by token blocks, then expand by blocks of columns.

template <int R, int N, class T, class W>
inline void shrink_ranks(const Adapters<T, W>& p, const Segment& s, int first, int rank, const T* const* xs) {
  for (int r = rank; r < rank + R && first == s.first; r++)
    for (int c = 0; c < s.width; c += CACHE_LINE / int(sizeof(W))) __builtin_prefetch(p.memory + s.extent->b + long(r) * s.width + c, 0, 2);
  float out[R][N];
  dots<R, N>(p.memory + s.extent->a + long(rank) * p.in, xs, p.in, out);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + rank + r] = p.weights[first + j] * out[r][j];
}

template <int N, class T, class W>
void shrink_block(const Adapters<T, W>& p, const Segment& s, int first) {
  const T* xs[N];
  for (int j = 0; j < N; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
  int rank = 0;
  for (; rank + RANKS <= s.rank; rank += RANKS) shrink_ranks<RANKS, N>(p, s, first, rank, xs);
  for (; rank < s.rank; rank++) shrink_ranks<1, N>(p, s, first, rank, xs);
}

// (g − 1) · base + (b − bias) of one column of the segment's module.
template <class T, class W>
inline float shift(const Adapters<T, W>& p, const Segment& s, long token, int column) {
  const int own = column - s.column;
  float total = 0;
  if (s.extent->gain >= 0) total = std::fma(p.vectors[s.extent->gain + own] - 1, value(p.base[token * p.out + column]), total);
  if (s.extent->bias >= 0)
    total += p.vectors[s.extent->bias + own] - (p.bias ? value(p.bias[column]) : 0.f);
  return total;
}

// y[c] = base[c] + bias[c] + delta[c], rounded once; bias or delta may be null.
template <class Y, class T>
inline void add_up(Y* y, const T* base, const T* bias, const float* delta, int width) {
  int c = 0;
  for (; c + LANES <= width; c += LANES) {
    vec total = load(base + c);
    if (bias) total += load(bias + c);
    if (delta) total += load(delta + c);
    store(y + c, total);
  }
  for (; c < width; c++)
    store(y + c, value(base[c]) + (bias ? value(bias[c]) : 0.f) + (delta ? delta[c] : 0.f));
}

// What one adapter gives N tokens in up to WIDE columns: the whole of what a token gets, or a part
// that is added to the token's sums, which lie from column `begin` on.
template <int N, class T, class W>
void expand_block(const Adapters<T, W>& p, const Segment& s, int first, int column, int width, float* sums_of, int begin) {
  const float* hidden[N];
  float deltas[N][WIDE];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const W* rows = p.memory + s.extent->b + (column - s.column);
  combine<N>(hidden, s.rank, width, [&](int k) { return rows + long(k) * s.width; }, deltas);
  for (int j = 0; j < N; j++) {
    const long token = p.tokens[first + j], at = token * p.out + column;
    if (s.extent->gain >= 0 || s.extent->bias >= 0)
      for (int c = 0; c < width; c++) deltas[j][c] = std::fma(p.weights[first + j], shift(p, s, token, column + c), deltas[j][c]);
    const int place = s.places[token];
    if (place == ONE_ADAPTER)
      add_up(p.y + at, p.base + at, p.bias ? p.bias + column : nullptr, deltas[j], width);
    else {
      float* sums = sums_of + long(place) * MAX_COLUMNS + (column - begin);
      for (int c = 0; c < width; c++) sums[c] += deltas[j][c];
    }
  }
}

// Ask for the A of a block, if it is its segment's first.
template <class T, class W>
ALWAYS_INLINE void prefetch_a(const Adapters<T, W>& p, const Block& block) {
  const Segment& s = *block.segment;
  const W* rows = p.memory + s.extent->a;
  for (long c = 0; c < long(s.rank) * p.in && block.first == s.first; c += CACHE_LINE / int(sizeof(W)))
    __builtin_prefetch(rows + c, 0, 2);
}

// Ask for the rows of B that `s` adds in columns begin to end.
template <class T, class W>
ALWAYS_INLINE void prefetch_rows(const Adapters<T, W>& p, const Segment& s, int begin, int end) {
  const W* rows = p.memory + s.extent->b - s.column;
  for (int k = 0; k < s.rank; k++)
    for (int c = begin; c < end; c += CACHE_LINE / int(sizeof(W))) __builtin_prefetch(rows + long(k) * s.width + c, 0, 2);
}

// Columns begin to end, of one module. What several adapters give a token is summed in float32 and
// rounded once.
template <class T, class W>
void apply_columns(const Adapters<T, W>& p, const Module& m, int begin, int end, float* sums) {
  const int width = end - begin;
  const T* bias = p.bias ? p.bias + begin : nullptr;
  for (long t = 0; t < p.num_tokens; t++) {
    const long at = t * p.out + begin;
    if (m.places[t] >= 0) add_up(sums + long(m.places[t]) * MAX_COLUMNS, p.base + at, bias, nullptr, width);
    else if (m.places[t] == NO_ADAPTER) add_up(p.y + at, p.base + at, bias, nullptr, width);
  }
  for (const Segment* s = m.segments; s != m.segments + m.num_segments; s++) {
    if (s + 1 != m.segments + m.num_segments) prefetch_rows(p, s[1], begin, end);
    for (int first = s->first; first < s->last; first += TOKENS)
      by_tokens(s->last - first, [&](auto n) {
        for (int c = begin; c < end; c += WIDE) expand_block<n>(p, *s, first, c, std::min(WIDE, end - c), sums, begin);
      });
  }
  for (long t = 0; t < p.num_tokens; t++)
    if (m.places[t] >= 0)
      for (int c = 0; c < width; c++) store(p.y + t * p.out + begin + c, sums[long(m.places[t]) * MAX_COLUMNS + c]);
}

template <class T, class W>
void apply_adapters(const Adapters<T, W>& p, int num_threads) {
  static thread_local std::vector<Block> own_blocks;
  own_blocks.clear();
  for (const Module& m : *p.modules)
    for (const Segment* s = m.segments; s != m.segments + m.num_segments; s++)
      for (int first = s->first; first < s->last; first += TOKENS) own_blocks.push_back({s, first});
  const std::vector<Block>& blocks = own_blocks;  // the caller's, seen by every thread
  const std::vector<Columns>& columns = *p.columns;
  Pool::get().run(blocks.size(), 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) {
      if (i + 2 < long(blocks.size())) prefetch_a(p, blocks[i + 2]);  // by then the other thread has the next
      const Segment& s = *blocks[i].segment;
      by_tokens(s.last - blocks[i].first, [&](auto n) { shrink_block<n>(p, s, blocks[i].first); });
    }
  });
  Pool::get().run(columns.size(), 1, num_threads, [&](long begin, long end) {
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(p.num_sums * MAX_COLUMNS);
    for (long i = begin; i < end; i++)
      apply_columns(p, *columns[i].module, columns[i].begin, columns[i].end, sums);
  });
}
