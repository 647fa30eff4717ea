// Every row's own adapters: shrink by token blocks, then expand by blocks of columns.

constexpr int BLOCK_TOKENS = (8 + TOKENS - 1) / TOKENS * TOKENS;  // whose A x is one piece of work

// Call `run` with as many entries as a block takes, as a constant, and the first of them. One more than
// that are two blocks alike: the sums of a single token are too few to keep the multipliers busy. But
// four alone are one block: their adapter comes from memory, which is what takes time, and passes once.
template <class Run>
inline void in_blocks(int first, int last, Run run) {
  if (last - first == MOST_TOKENS) return run(std::integral_constant<int, MOST_TOKENS>(), first);
  while (first < last) {
    const int left = last - first;
    by_tokens(left == TOKENS + 1 ? (left + 1) / 2 : left, [&](auto n) {
      run(n, first);
      first += n;
    });
  }
}

// hidden[t][rank:rank + R] = weight · A x of the block's tokens. A segment's first tokens ask for the
// rows that come next; for those behind they are in a cache.
template <int R, class T, class W>
inline void shrink_ranks(const Adapters<T, W>& p, const Block& block, int rank) {
  const Segment& s = *block.segment;
  const W* rows = p.memory + s.extent->a + long(rank) * p.in;
  in_blocks(block.first, block.last, [&](auto n, int first) {
    if constexpr (R * n > MAX_TOTALS) return;  // never: `shrink_block` gives so many tokens fewer rows
    const T* xs[n];
    for (int j = 0; j < n; j++) xs[j] = p.x + long(p.tokens[first + j]) * p.in;
    float found[NUM_SUMS];
    dots<R, n>(rows, xs, p.in, found, first == s.first ? rows + long(R) * p.in : nullptr);
    for (int j = 0; j < n; j++)
      for (int r = 0; r < R; r++)
        p.hidden[s.hidden + long(first + j - s.first) * s.rank + rank + r] = p.weights[first + j] * found[RANKS * j + r];
  });
}

// `shrink_ranks` of as many times R rows as there are from `rank` on; where they end.
template <int R, class T, class W>
int shrink_rows(const Adapters<T, W>& p, const Block& block, int rank) {
  for (; rank + R <= block.segment->rank; rank += R) shrink_ranks<R>(p, block, rank);
  return rank;
}

// A few rows of A at a time are multiplied by all tokens, so that they are read from memory once.
template <class T, class W>
void shrink_block(const Adapters<T, W>& p, const Block& block) {
  const bool is_most = block.last - block.first == MOST_TOKENS;
  int rank = is_most ? shrink_rows<MAX_TOTALS / MOST_TOKENS>(p, block, 0) : shrink_rows<RANKS>(p, block, 0);
  rank = shrink_rows<2>(p, block, rank);
  shrink_rows<1>(p, block, rank);
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

// sums[j][0:width] += Σ_r scales[j][r] · rows[r · stride : r · stride + width] for K rows and N tokens, or
// that itself if they are the first. Meanwhile as much is asked for from `ahead` on, unless that is null.
template <int K, int N, class W>
inline void add_rows(const W* rows, long stride, const float* const* scales, int width, bool are_first,
                     float (*sums)[LONG_COLUMNS], const W* ahead) {
  vec filled_scales[N][K], totals[N];
  for (int j = 0; j < N; j++)
    for (int r = 0; r < K; r++) filled_scales[j][r] = filled(scales[j][r]);
  const auto add = [&](int c, auto read) {
    for (int j = 0; j < N; j++) totals[j] = are_first ? vec{} : load(sums[j] + c);
    for (int r = 0; r < K; r++) {
      if (ahead) __builtin_prefetch(ahead + r * stride + c, 0, 2);
      const vec values = read(rows + r * stride + c);
      for (int j = 0; j < N; j++) totals[j] = fused(totals[j], filled_scales[j][r], values);
    }
    for (int j = 0; j < N; j++) store(sums[j] + c, totals[j]);
  };
  int c = 0;
  for (; c + LANES <= width; c += LANES) add(c, [](const W* own) { return load(own); });
  if (c < width) add(c, [&](const W* own) { return load_part(own, width - c); });
}

// What one adapter gives N tokens in some columns: the whole of what a token gets, or a part that is
// added to the token's sums.
template <int N, class T, class W>
void expand_block(const Adapters<T, W>& p, const Segment& s, int first, int begin, int end, float* all_sums) {
  const int width = end - begin;
  alignas(64) float deltas[N][LONG_COLUMNS];
  const float* hidden[N];
  for (int j = 0; j < N; j++) hidden[j] = p.hidden + s.hidden + long(first + j - s.first) * s.rank;
  const W* rows = p.memory + s.extent->b + (begin - s.column);
  // One token is added faster than memory brings its rows, whatever is asked for.
  const bool asks = N > 1 && first == s.first;
  const auto add = [&](auto count, int k) {
    const W *own = rows + long(k) * s.width, *next = own + long(count) * s.width;
    add_rows<count, N>(own, s.width, hidden, width, k == 0, deltas, asks && k + count < s.rank ? next : nullptr);
    for (int j = 0; j < N; j++) hidden[j] += count;
  };
  int k = 0;
  for (; k + RANKS <= s.rank; k += RANKS) add(std::integral_constant<int, RANKS>(), k);
  for (; k < s.rank; k++) add(std::integral_constant<int, 1>(), k);
  for (int j = 0; j < N; j++) {
    if (s.rank == 0) std::fill_n(deltas[j], width, 0.f);
    const long token = p.tokens[first + j], at = token * p.out + begin;
    if (s.extent->gain >= 0 || s.extent->bias >= 0)
      for (int c = 0; c < width; c++) deltas[j][c] = std::fma(p.weights[first + j], shift(p, s, token, begin + c), deltas[j][c]);
    const int place = s.places[token];
    if (place == ONE_ADAPTER)
      add_up(p.y + at, p.base + at, p.bias ? p.bias + begin : nullptr, deltas[j], width);
    else {
      float* sums = all_sums + long(place) * MAX_COLUMNS;
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
template <class T, class W>
void apply_columns(const Adapters<T, W>& p, const Columns& own, float* sums) {
  const Module& m = *own.module;
  const int begin = own.begin, end = own.end, width = end - begin;
  const T* bias = p.bias ? p.bias + begin : nullptr;
  // Tokens without an adapter are done with the first segments.
  for (long t = 0; t < p.num_tokens && own.first == m.segments; t++) {
    const long at = t * p.out + begin;
    if (m.places[t] >= 0) add_up(sums + long(m.places[t]) * MAX_COLUMNS, p.base + at, bias, nullptr, width);
    else if (m.places[t] == NO_ADAPTER && (bias || p.y != p.base)) add_up(p.y + at, p.base + at, bias, nullptr, width);
  }
  for (const Segment* s = own.first; s != own.last; s++)
    in_blocks(s->first, s->last, [&](auto n, int first) {
      prefetch_outputs(p, *s, first + n, begin, end);
      expand_block<n>(p, *s, first, begin, end, sums);
    });
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
      for (int first = s->first; first < s->last; first += BLOCK_TOKENS)
        own_blocks.push_back({s, first, std::min(first + BLOCK_TOKENS, s->last)});
  const std::vector<Block>& blocks = own_blocks;  // the caller's, seen by every thread
  Pool::get().run(blocks.size(), 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) shrink_block(p, blocks[i]);
  });
  const std::vector<Columns>& columns = *p.columns;
  Pool::get().run(columns.size(), 1, num_threads, [&](long begin, long end) {
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(p.num_sums * MAX_COLUMNS);
    for (long i = begin; i < end; i++) apply_columns(p, columns[i], sums);
  });
}
