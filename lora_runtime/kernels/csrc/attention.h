// Attention over the paged cache, one token and key-value head at a time.

// scores[0:count] → unnormalised softmax weights; returns their sum and that of the sink, a score
// more. NaN or ∞ gives NaN. What lies behind them in the last vector becomes 0.
template <class T>
inline float soften(const Attention<T>& p, float* scores, int count, float sink) {
  if (p.softcap > 0)
    for (int i = 0; i < count; i++) scores[i] = p.softcap * std::tanh(scores[i] / p.softcap);
  for (int i = count; i % LANES; i++) scores[i] = -INFINITY;
  vec most = filled(sink), totals = {};
  for (int i = 0; i < count; i += LANES) {
    const vec some = load(scores + i);
    most = some > most ? some : most;
  }
  float largest = most[0];
  for (int l = 1; l < LANES; l++) largest = std::max(largest, most[l]);
  for (int i = 0; i < count; i += LANES) {
    const vec weights = exp_negative(load(scores + i) - largest);
    store(scores + i, weights);
    totals += weights;
  }
  return sum(totals) + std::exp(sink - largest);
}

constexpr int HEADS = 4;  // query heads that share each load of a key
constexpr int AHEAD = 64;  // positions that a key is asked for before it is multiplied

// N query heads of one token that share a key-value head, over `count` cached positions. Behind their
// slots are those of AHEAD more, which are read next. `scores` has room for `count` of every head, and
// as many more as fill a vector.
template <int N, class T>
void attend(const Attention<T>& p, int head, const T* q, T* out, const long* slots, int count, float* scores) {
  const int room = (count + LANES - 1) / LANES * LANES, size = (p.head_dim + LANES - 1) / LANES;
  vec queries[N][MAX_CHUNKS], products[N][LANES];
  for (int j = 0; j < N; j++)
    for (int c = 0; c < size; c++)
      queries[j][c] = load_part(q + long(j) * p.head_dim + c * LANES, std::min(LANES, p.head_dim - c * LANES));
  for (int begin = 0; begin < count; begin += LANES) {
    for (int i = 0; i < LANES; i++) {
      const int place = std::min(begin + i, count - 1);
      const T* key = p.keys + slots[place];
      for (int d = 0; d < p.head_dim; d += CACHE_LINE / int(sizeof(T))) {
        __builtin_prefetch(p.keys + slots[place + AHEAD] + d, 0, 2);
        __builtin_prefetch(p.values + slots[place] + d, 0, 2);
      }
      vec total[N] = {};
      for (int c = 0; c < p.head_dim / LANES; c++) {
        const vec part = load(key + c * LANES);
        for (int j = 0; j < N; j++) total[j] = fused(total[j], queries[j][c], part);
      }
      if (p.head_dim % LANES) {
        const vec part = load_part(key + (size - 1) * LANES, p.head_dim % LANES);
        for (int j = 0; j < N; j++) total[j] = fused(total[j], queries[j][size - 1], part);
      }
      for (int j = 0; j < N; j++) products[j][i] = total[j];
    }
    for (int j = 0; j < N; j++) {
      store(scores + long(j) * room + begin, sums(products[j]) * p.scale);
    }
  }
  float totals[N];
  const float* weights[N];
  for (int j = 0; j < N; j++) weights[j] = scores + long(j) * room;
  for (int j = 0; j < N; j++) {
    const float sink = p.sinks ? p.sinks[head + j] : -INFINITY;
    totals[j] = count > 0 ? soften(p, scores + long(j) * room, count, sink) : 1;
  }
  constexpr int V = VECTORS<N>;
  for (int d = 0; d < p.head_dim; d += V * LANES) {
    const int width = std::min(V * LANES, p.head_dim - d);
    float found[N][V * LANES];
    combine<N, V>(weights, count, width, [&](int i) { return p.values + slots[i] + d; }, found);
    for (int j = 0; j < N; j++) {
      T* own = out + long(j) * p.head_dim + d;
      int c = 0;
      for (; c + LANES <= width; c += LANES) store(own + c, load(found[j] + c) / totals[j]);
      for (; c < width; c++) store(own + c, found[j][c] / totals[j]);
    }
  }
}

// One key-value head of one token: where in `keys` what it sees lies.
template <class T>
struct HeadTask {
  const Attention<T>& p;
  int token, kv_head, begin, end;  // positions
  HeadTask(const Attention<T>& own, long task)
      : p(own), token(int(task / p.num_kv_heads)), kv_head(int(task % p.num_kv_heads)), end(p.positions[token] + 1) {
    begin = p.window > 0 ? std::max(0, end - p.window) : 0;
  }
  int count() const { return end - begin; }
  void find_slots(int count, long* slots) const {
    const int32_t* table = p.tables + long(p.rows[token]) * p.table_width;
    const long step = long(p.num_kv_heads) * p.head_dim;
    for (int i = 0; i < count;) {
      const int block = (begin + i) / p.block_size, within = (begin + i) % p.block_size;
      const int last = std::min(count, i + p.block_size - within);
      long slot = (long(table[block]) * p.block_size + within) * step + long(kv_head) * p.head_dim;
      for (; i < last; i++, slot += step) slots[i] = slot;
    }
  }
};

// next: what this thread likely does afterwards.
template <class T>
void attend_task(const Attention<T>& p, const HeadTask<T>& own, const HeadTask<T>& next) {
  static thread_local Scratch positions, floats;
  const int count = own.count(), num_ahead = std::min(AHEAD, next.count()), group = p.num_heads / p.num_kv_heads;
  long* slots = positions.get<long>(count + AHEAD);
  float* scores = floats.get<float>(long(HEADS) * (count + LANES));
  own.find_slots(count, slots);
  next.find_slots(num_ahead, slots + count);
  std::fill_n(slots + count + num_ahead, AHEAD - num_ahead, 0);
  const long at = (long(own.token) * p.num_heads + own.kv_head * group) * p.head_dim;
  const T* q = p.q + at;
  T* out = p.out + at;
  const int first = own.kv_head * group;
  int head = 0;
  for (; head + HEADS <= group; head += HEADS)
    attend<HEADS>(p, first + head, q + head * p.head_dim, out + head * p.head_dim, slots, count, scores);
  for (; head + 3 <= group; head += 3)
    attend<3>(p, first + head, q + head * p.head_dim, out + head * p.head_dim, slots, count, scores);
  for (; head < group; head++)
    attend<1>(p, first + head, q + head * p.head_dim, out + head * p.head_dim, slots, count, scores);
}

template <class T>
void paged_attention(const Attention<T>& p, int num_threads) {
  const long work = long(p.num_tokens) * p.num_heads * p.head_dim * p.block_size;
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
  const long count = long(p.num_tokens) * p.num_kv_heads;
  Pool::get().run(count, 4, num_threads, [&](long begin, long end) {
    for (long task = begin; task < end; task++)
      attend_task(p, HeadTask<T>(p, task), HeadTask<T>(p, std::min(task + 1, count - 1)));
  });
}
