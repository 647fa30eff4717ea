// Every row's own adapters: shrink by token blocks, then expand by blocks of columns.

template <int R, int N, class T, class W>
inline void shrink_ranks(const Adapters<T, W>& p, const Segment& s, int first, int rank, const T* const* xs, const W* ahead) {
  float found[TOKENS * RANKS];
  dots<R, N>(p.memory + s.extent->a + long(rank) * p.in, xs, p.in, found, ahead);
  for (int j = 0; j < N; j++)
    for (int r = 0; r < R; r++)
      p.hidden[s.hidden + long(first + j - s.first) * s.rank + rank + r] = p.weights[first + j] * found[RANKS * j + r];
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

// Asks for the rows of B that columns need, in the order in which they are added: memory that is
// read in short pieces is not foreseen by the processor.
template <class T, class W>
class RowsAhead {
 public:
  // next: the columns that this thread likely does afterwards.
  RowsAhead(const Adapters<T, W>& p, const Columns& own, const Columns& next) : p_(p), columns_(&own), next_(&next) {
    enter();
    for (int k = 0; k < DISTANCE; k++) ask();
  }

  // For the row that lies DISTANCE after the last one.
  ALWAYS_INLINE void ask() {
    if (!segment_) return;
    const W* row = p_.memory + segment_->extent->b - segment_->column + long(k_) * segment_->width;
    for (int c = columns_->begin; c < columns_->end; c += CACHE_LINE / int(sizeof(W))) __builtin_prefetch(row + c, 0, 2);
    if (++k_ < segment_->rank) return;
    k_ = 0;
    segment_++;
    pass_empty();
  }

 private:
  static constexpr int DISTANCE = 32;  // rows

  void enter() {
    segment_ = columns_->first;
    pass_empty();
  }

  void pass_empty() {
    while (segment_ != columns_->last && segment_->rank == 0) segment_++;
    if (segment_ != columns_->last) return;
    segment_ = nullptr;
    if (columns_ == next_) return;
    columns_ = next_;
    enter();
  }

  const Adapters<T, W>& p_;
  const Columns *columns_, *next_;
  const Segment* segment_;  // null: there is nothing more
  int k_ = 0;
};

// What one adapter gives N tokens in `width` columns, at most VECTORS of them: the whole of what a
// token gets, or a part that is added to the token's sums, which lie from column `begin` on.
// ahead: null but where the segment's rows of B are first read.
template <int N, class T, class W>
void expand_block(const Adapters<T, W>& p, const Segment& s, int first, int column, int width, float* all_sums, int begin,
                  RowsAhead<T, W>* ahead) {
  constexpr int V = VECTORS<N>;
  const float* hidden[N];
  float deltas[N][V * LANES];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const auto row = [rows = p.memory + s.extent->b + (column - s.column), &s](int k) { return rows + long(k) * s.width; };
  const auto row_and_ahead = [&](int k) {
    ahead->ask();
    return row(k);
  };
  // A narrow block goes over the rows once for each vector: it asks for as many as it has before.
  const bool is_whole = width == V * LANES;
  for (int k = 0; k < s.rank && ahead && !is_whole; k++) ahead->ask();
  if (ahead && is_whole) combine<N, V>(hidden, s.rank, width, row_and_ahead, deltas);
  else combine<N, V>(hidden, s.rank, width, row, deltas);
  for (int j = 0; j < N; j++) {
    const long token = p.tokens[first + j], at = token * p.out + column;
    if (s.extent->gain >= 0 || s.extent->bias >= 0)
      for (int c = 0; c < width; c++) deltas[j][c] = std::fma(p.weights[first + j], shift(p, s, token, column + c), deltas[j][c]);
    const int place = s.places[token];
    if (place == ONE_ADAPTER)
      add_up(p.y + at, p.base + at, p.bias ? p.bias + column : nullptr, deltas[j], width);
    else {
      float* sums = all_sums + long(place) * MAX_COLUMNS + (column - begin);
      for (int c = 0; c < width; c++) sums[c] += deltas[j][c];
    }
  }
}

// Ask for the base's outputs of the block of the segment's entries that begins with `first`, if any.
template <class T, class W>
ALWAYS_INLINE void prefetch_outputs(const Adapters<T, W>& p, const Segment& s, int first, int begin, int end) {
  for (int entry = first; entry < std::min(first + TOKENS, s.last); entry++)
    for (int c = begin; c < end; c += CACHE_LINE / int(sizeof(T)))
      __builtin_prefetch(p.base + long(p.tokens[entry]) * p.out + c, 0, 2);
}

// Columns of one module. What several adapters give a token is summed in float32 and rounded once.
// next: what this thread likely does afterwards; its first rows of B are asked for at the end.
template <class T, class W>
void apply_columns(const Adapters<T, W>& p, const Columns& own, const Columns& next, float* sums) {
  const Module& m = *own.module;
  const int begin = own.begin, end = own.end, width = end - begin;
  const T* bias = p.bias ? p.bias + begin : nullptr;
  // Tokens without an adapter are done with the first segments.
  for (long t = 0; t < p.num_tokens && own.first == m.segments; t++) {
    const long at = t * p.out + begin;
    if (m.places[t] >= 0) add_up(sums + long(m.places[t]) * MAX_COLUMNS, p.base + at, bias, nullptr, width);
    else if (m.places[t] == NO_ADAPTER && (bias || p.y != p.base)) add_up(p.y + at, p.base + at, bias, nullptr, width);
  }
  RowsAhead<T, W> ahead(p, own, next);
  for (const Segment* s = own.first; s != own.last; s++) {
    for (int first = s->first; first < s->last; first += TOKENS)
      by_tokens(s->last - first, [&](auto n) {
        prefetch_outputs(p, *s, first + n, begin, end);
        constexpr int WIDTH = VECTORS<n> * LANES;
        for (int c = begin; c < end; c += WIDTH) {
          const bool is_first = first == s->first && c == begin;
          expand_block<n>(p, *s, first, c, std::min(WIDTH, end - c), sums, begin, is_first ? &ahead : nullptr);
        }
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
  // A thread's next block is likely the one that follows; only prefetches rest on it.
  const long count = blocks.size();
  Pool::get().run(count, 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) {
      const Segment& s = *blocks[i].segment;
      const Block& next = blocks[std::min(i + 1, count - 1)];
      by_tokens(s.last - blocks[i].first,
                [&](auto n) { shrink_block<n>(p, s, blocks[i].first, p.memory + next.segment->extent->a); });
    }
  });
  const std::vector<Columns>& columns = *p.columns;
  Pool::get().run(columns.size(), 1, num_threads, [&](long begin, long end) {
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(p.num_sums * MAX_COLUMNS);
    for (long i = begin; i < end; i++)
      apply_columns(p, columns[i], columns[std::min(i + 1, long(columns.size()) - 1)], sums);
  });
}
