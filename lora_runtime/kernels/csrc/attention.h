// Attention over the paged cache, one token at a time. Its keys are read position by position, of all
// heads as they lie in memory, and then its values: the row of one head is too short for a processor
// to foresee. Each row asks for one that comes later, as many at once would wait for each other.

// scores[0:count] → unnormalised softmax weights; returns their sum and that of the sink, a score
// more. NaN or +∞ gives NaN. What lies behind them in the last vector becomes 0.
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
constexpr int KEYS = 2;  // keys that share each load of a query
constexpr int AHEAD = 16;  // positions that a key or value is asked for before it is read
constexpr int VALUE_POSITIONS = 32;  // whose values are added up in registers
constexpr long SCORES = 1 << 15;  // of a token that are kept at a time, unless one key-value head has more

// Where in the cache what a token sees lies: of each of `count` positions the first key-value head
// of a task. Behind them are AHEAD more, which are likely read next.
struct Seen { const long* slots; int count; };

// Ask for `count` values that lie behind each other.
template <class T>
ALWAYS_INLINE void ask(const T* from, int count) {
  for (int i = 0; i < count; i += CACHE_LINE / int(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// One key-value head of a layer.
template <class T>
struct KeysAndValues { const T *keys, *values; };

// scores[j][i] = scale · queries[j] · key i of N query heads and LANES positions from `begin` on. Rows
// of queries are `size` long, zeros after head_dim, those of scores `room`.
template <int N, class T>
ALWAYS_INLINE void score_block(const Attention<T>& p, const KeysAndValues<T>& head, const Seen& seen, int begin,
                               const float* queries, int size, float* scores, long room) {
  const auto after = [&](int i) {
    return i < seen.count ? head.keys + seen.slots[i] : head.values + seen.slots[std::min(i - seen.count, seen.count - 1)];
  };
  vec products[N][LANES];
  for (int i = begin; i < begin + LANES; i += KEYS) {
    const T* key[KEYS];
    for (int n = 0; n < KEYS; n++) {
      key[n] = head.keys + seen.slots[std::min(i + n, seen.count - 1)];
      ask(after(i + n + AHEAD), p.head_dim);
    }
    vec totals[N][KEYS];
    clear(totals);
    for (int c = 0; c < p.head_dim; c += LANES) {
      vec parts[KEYS];
      for (int n = 0; n < KEYS; n++)
        parts[n] = p.head_dim - c >= LANES ? load(key[n] + c) : load_part(key[n] + c, p.head_dim - c);
      for (int j = 0; j < N; j++) {
        const vec query = load(queries + long(j) * size + c);
        for (int n = 0; n < KEYS; n++) totals[j][n] = fused(totals[j][n], query, parts[n]);
      }
    }
    for (int j = 0; j < N; j++)
      for (int n = 0; n < KEYS; n++) products[j][i - begin + n] = totals[j][n];
  }
  for (int j = 0; j < N; j++) store(scores + long(j) * room + begin, sums(products[j]) * p.scale);
}

// Positions whose values are weighed: weights[j · room + i] is that of head j at position i.
struct Weighed { const float* weights; long room; int begin, end; };

// found[j] += Σ_i weight of position i · values[i] for N query heads and, from `d` on, V vectors of a
// value, or its last part. Rows of `found` are `size` long.
template <int N, int V, class T>
ALWAYS_INLINE void add_vectors(const KeysAndValues<T>& head, const Seen& seen, const Weighed& by, int d, int head_dim, float* found,
                               int size) {
  vec totals[N][V];
  for (int j = 0; j < N; j++)
    for (int v = 0; v < V; v++) totals[j][v] = load(found + long(j) * size + d + v * LANES);
  for (int i = by.begin; i < by.end; i++) {
    const T* value = head.values + seen.slots[i] + d;
    ask((i + AHEAD < seen.count ? head.values : head.keys) + seen.slots[i + AHEAD] + d, V * LANES);
    vec scales[N];
    for (int j = 0; j < N; j++) scales[j] = filled(by.weights[j * by.room + i]);
    for (int v = 0; v < V; v++) {
      const vec part = V == 1 && head_dim - d < LANES ? load_part(value, head_dim - d) : load(value + v * LANES);
      for (int j = 0; j < N; j++) totals[j][v] = fused(totals[j][v], scales[j], part);
    }
  }
  for (int j = 0; j < N; j++)
    for (int v = 0; v < V; v++) store(found + long(j) * size + d + v * LANES, totals[j][v]);
}

// The same for whole values.
template <int N, class T>
ALWAYS_INLINE void add_values(const KeysAndValues<T>& head, const Seen& seen, const Weighed& by, int head_dim, float* found,
                              int size) {
  constexpr int V = std::min(8, std::max(2, MAX_TOTALS / N / 2 * 2));
  int d = 0;
  for (; d + V * LANES <= head_dim; d += V * LANES) add_vectors<N, V>(head, seen, by, d, head_dim, found, size);
  for (; d + 2 * LANES <= head_dim; d += 2 * LANES) add_vectors<N, 2>(head, seen, by, d, head_dim, found, size);
  for (; d < head_dim; d += LANES) add_vectors<N, 1>(head, seen, by, d, head_dim, found, size);
}

// Call `run` with some of a group's query heads, as a constant, and the first of them, for all.
template <class Run>
ALWAYS_INLINE void by_heads(int group, Run run) {
  int head = 0;
  for (; head + HEADS <= group; head += HEADS) run(std::integral_constant<int, HEADS>(), head);
  for (; head + 3 <= group; head += 3) run(std::integral_constant<int, 3>(), head);
  for (; head < group; head++) run(std::integral_constant<int, 1>(), head);
}

// The query heads, from `first_head` on, of `num_kv` key-value heads of a token, of which the first lies
// `offset` values after what `seen` says.
template <class T>
void attend(const Attention<T>& p, const T* q, T* out, int first_head, int num_kv, long offset, const Seen& seen, Scratch& floats) {
  const int group = p.num_heads / p.num_kv_heads, num = num_kv * group, count = seen.count;
  const int size = (p.head_dim + LANES - 1) / LANES * LANES;
  const long room = (count + LANES - 1) / LANES * LANES;
  float* queries = floats.get<float>(num * (2 * size + room + 1));
  float *found = queries + long(num) * size, *scores = found + long(num) * size, *totals = scores + num * room;
  for (int j = 0; j < num; j++)
    for (int c = 0; c < size; c += LANES) {
      const T* own = q + long(j) * p.head_dim + c;
      store(queries + long(j) * size + c, p.head_dim - c >= LANES ? load(own) : load_part(own, p.head_dim - c));
      store(found + long(j) * size + c, vec{});
    }
  // Of all key-value heads: run(how many query heads as a constant, their key-value head, the first of them).
  const auto each = [&](auto run) {
    for (int kv = 0; kv < num_kv; kv++) {
      const long at = offset + long(kv) * p.head_dim;
      const KeysAndValues<T> head{p.keys + at, p.values + at};
      by_heads(group, [&](auto n, int j) { run(n, head, kv * group + j); });
    }
  };
  for (int begin = 0; begin < count; begin += LANES)
    each([&](auto n, const auto& head, int j) {
      score_block<n>(p, head, seen, begin, queries + long(j) * size, size, scores + j * room, room);
    });
  for (int j = 0; j < num; j++) {
    const float sink = p.sinks ? p.sinks[first_head + j] : -INFINITY;
    totals[j] = count > 0 ? soften(p, scores + j * room, count, sink) : 1;
  }
  for (int begin = 0; begin < count; begin += VALUE_POSITIONS)
    each([&](auto n, const auto& head, int j) {
      const Weighed by{scores + j * room, room, begin, std::min(begin + VALUE_POSITIONS, count)};
      add_values<n>(head, seen, by, p.head_dim, found + long(j) * size, size);
    });
  for (int j = 0; j < num; j++) {
    T* own = out + long(j) * p.head_dim;
    const float* sums = found + long(j) * size;
    int c = 0;
    for (; c + LANES <= p.head_dim; c += LANES) store(own + c, load(sums + c) / totals[j]);
    for (; c < p.head_dim; c++) store(own + c, sums[c] / totals[j]);
  }
}

// Some key-value heads of one token: where in `keys` what it sees lies.
template <class T>
struct TokenTask {
  const Attention<T>& p;
  int token, num_kv, first_kv, begin, end;  // begin, end: positions
  TokenTask(const Attention<T>& own, int parts, long task)
      : p(own), token(int(task / parts)), num_kv(own.num_kv_heads / parts), first_kv(int(task % parts) * num_kv),
        end(p.positions[token] + 1) {
    begin = p.window > 0 ? std::max(0, end - p.window) : 0;
  }
  int count() const { return std::max(0, end - begin); }
  void find_slots(int count, long* slots) const {
    const int32_t* table = p.tables + long(p.rows[token]) * p.table_width;
    const long step = long(p.num_kv_heads) * p.head_dim;
    for (int i = 0; i < count;) {
      const int block = (begin + i) / p.block_size, within = (begin + i) % p.block_size;
      const int last = std::min(count, i + p.block_size - within);
      long slot = (long(table[block]) * p.block_size + within) * step + long(first_kv) * p.head_dim;
      for (; i < last; i++, slot += step) slots[i] = slot;
    }
  }
};

// next: what this thread likely does afterwards.
template <class T>
void attend_task(const Attention<T>& p, const TokenTask<T>& own, const TokenTask<T>& next) {
  static thread_local Scratch positions, floats;
  const int count = own.count(), num_ahead = std::min(AHEAD, next.count()), group = p.num_heads / p.num_kv_heads;
  long* slots = positions.get<long>(count + AHEAD);
  own.find_slots(count, slots);
  next.find_slots(num_ahead, slots + count);
  std::fill_n(slots + count + num_ahead, AHEAD - num_ahead, 0);
  const int at_once = int(std::clamp<long>(SCORES / (long(group) * (count + 1)), 1, own.num_kv));
  for (int kv = 0; kv < own.num_kv; kv += at_once) {
    const int head = (own.first_kv + kv) * group;
    const long at = (long(own.token) * p.num_heads + head) * p.head_dim;
    attend(p, p.q + at, p.out + at, head, std::min(at_once, own.num_kv - kv), long(kv) * p.head_dim, Seen{slots, count}, floats);
  }
}

template <class T>
void paged_attention(const Attention<T>& p, int num_threads) {
  const long work = long(p.num_tokens) * p.num_heads * p.head_dim * p.block_size;
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
  // Of few tokens each key-value head is a task of its own, so that all threads have one.
  const int parts = num_threads != 1 && p.num_tokens < 4 * std::abs(num_threads) ? p.num_kv_heads : 1;
  const long count = long(p.num_tokens) * parts;
  Pool::get().run(count, 1, num_threads, [&](long begin, long end) {
    for (long task = begin; task < end; task++)
      attend_task(p, TokenTask<T>(p, parts, task), TokenTask<T>(p, parts, std::min(task + 1, count - 1)));
  });
}
