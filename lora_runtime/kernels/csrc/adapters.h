// Every row's own adapters: shrink by token blocks, then expand by blocks of columns.

template <int R, int N, class T, class W>
inline void shrink_ranks(const Adapters<T, W>& p, const Segment& s, int first, int rank, const T* const* xs, const W* ahead) {
  float out[R][N];
  dots<R, N>(p.memory + s.extent->a + long(rank) * p.in, xs, p.in, out, ahead);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + rank + r] = p.weights[first + j] * out[r][j];
}

// ahead: the rows that are multiplied next.
template <int N, class T, class W>
void shrink_block(const Adapters<T, W>& p, const Segment& s, int first, const W* ahead) {
  const T* xs[N];
  for (int j = 0; j < N; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
  const W* own = p.memory + s.extent->a;
  const auto next = [&](int rank) { return rank < s.rank ? own + long(rank) * p.in : ahead; };
  int rank = 0;
  for (; rank + RANKS <= s.rank; rank += RANKS) shrink_ranks<RANKS, N>(p, s, first, rank, xs, next(rank + RANKS));
  for (; rank < s.rank; rank++) shrink_ranks<1, N>(p, s, first, rank, xs, next(rank + 1));
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

// What one adapter gives N tokens in `width` columns, at most VECTORS of them: the whole of what a
// token gets, or a part that is added to the token's sums, which lie from column `begin` on.
template <int N, class T, class W>
void expand_block(const Adapters<T, W>& p, const Segment& s, int first, int column, int width, float* sums_of, int begin) {
  constexpr int V = VECTORS<N>;
  const float* hidden[N];
  float deltas[N][V * LANES];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const auto row = [rows = p.memory + s.extent->b + (column - s.column), &s](int k) { return rows + long(k) * s.width; };
  combine<N, V>(hidden, s.rank, width, row, deltas);
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

// Ask for the rows of B that `s` adds in columns begin to end.
template <class T, class W>
ALWAYS_INLINE void prefetch_rows(const Adapters<T, W>& p, const Segment& s, int begin, int end) {
  const W* rows = p.memory + s.extent->b - s.column;
  for (int k = 0; k < s.rank; k++)
    for (int c = begin; c < end; c += CACHE_LINE / int(sizeof(W))) __builtin_prefetch(rows + long(k) * s.width + c, 0, 2);
}

// Columns of one module. What several adapters give a token is summed in float32 and rounded once.
// next: columns of which the first rows of B are asked for meanwhile, as this thread likely does
// them then.
template <class T, class W>
void apply_columns(const Adapters<T, W>& p, const Columns& own, const Columns& next, float* sums) {
  const Module& m = *own.module;
  const int begin = own.begin, end = own.end, width = end - begin;
  const T* bias = p.bias ? p.bias + begin : nullptr;
  for (long t = 0; t < p.num_tokens; t++) {
    const long at = t * p.out + begin;
    if (m.places[t] >= 0) add_up(sums + long(m.places[t]) * MAX_COLUMNS, p.base + at, bias, nullptr, width);
    else if (m.places[t] == NO_ADAPTER) add_up(p.y + at, p.base + at, bias, nullptr, width);
  }
  for (const Segment* s = m.segments; s != m.segments + m.num_segments; s++) {
    if (s + 1 != m.segments + m.num_segments) prefetch_rows(p, s[1], begin, end);
    else if (next.module->num_segments > 0) prefetch_rows(p, *next.module->segments, next.begin, next.end);
    for (int first = s->first; first < s->last; first += TOKENS)
      by_tokens(s->last - first, [&](auto n) {
        constexpr int WIDTH = VECTORS<n> * LANES;
        for (int c = begin; c < end; c += WIDTH) expand_block<n>(p, *s, first, c, std::min(WIDTH, end - c), sums, begin);
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
  // To what a thread likely does next, if all go at one speed; only prefetches rest on it.
  const long step = std::abs(num_threads);
  const std::vector<Columns>& columns = *p.columns;
  Pool::get().run(blocks.size(), 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) {
      const Segment& s = *blocks[i].segment;
      const Block& next = blocks[std::min(i + step, long(blocks.size()) - 1)];
      by_tokens(s.last - blocks[i].first,
                [&](auto n) { shrink_block<n>(p, s, blocks[i].first, p.memory + next.segment->extent->a); });
    }
  });
  Pool::get().run(columns.size(), 1, num_threads, [&](long begin, long end) {
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(p.num_sums * MAX_COLUMNS);
    for (long i = begin; i < end; i++)
      apply_columns(p, columns[i], columns[std::min(i + step, long(columns.size()) - 1)], sums);
  });
}
