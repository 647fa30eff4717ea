// Attention over whole rows, without a cache, and its gradient; inside all is float32.
//
// A task is one segment (see varlen_attention.py) and one head of keys. What several segments give
// the gradient of keys that they share is added up in the segments' order. A segment's values are
// the same whatever segments stand beside it.

constexpr int QUERIES = 48;  // of a head that are multiplied at a time
inline long padded(long count) { return (count + WIDE - 1) / WIDE * WIDE; }

// c[j] = (or += with ADD) Σ_k a(j, k) · b[k] for N rows and WIDE columns. a(j, k) is at j · row_step +
// k · step.
template <int N, bool ADD>
inline void small_block(const float* a, long row_step, long step, int depth, const float* b, float* c, long stride,
                        long c_stride) {
  vec left[N], right[N];
  for (int j = 0; j < N; j++) {
    left[j] = ADD ? load(c + j * c_stride) : vec{};
    right[j] = ADD ? load(c + j * c_stride + LANES) : vec{};
  }
  for (int k = 0; k < depth; k++) {
    const vec first = load(b + k * stride), second = load(b + k * stride + LANES);
    for (int j = 0; j < N; j++) {
      const float scale = a[j * row_step + k * step];
      left[j] = fused(left[j], scale, first);
      right[j] = fused(right[j], scale, second);
    }
  }
  for (int j = 0; j < N; j++) store(c + j * c_stride, left[j]), store(c + j * c_stride + LANES, right[j]);
}

// Values that lie row_step and step apart.
struct Factor { const float* values; long row_step, step; };
// Rows that lie `stride` apart.
struct Rows { float* values; long stride; };

// c = (or += with ADD) a b: (rows, depth) × (depth, width), `width` filled up to whole vectors.
template <bool ADD>
inline void small_product(Factor a, Rows b, Rows c, int rows, int depth, int width) {
  constexpr int AT_ONCE = 6;  // 2 · AT_ONCE sums and two of b's vectors fill the registers
  for (int column = 0; column < width; column += WIDE) {
    const float* of_b = b.values + column;
    int j = 0;
    for (; j + AT_ONCE <= rows; j += AT_ONCE)
      small_block<AT_ONCE, ADD>(a.values + j * a.row_step, a.row_step, a.step, depth, of_b,
                                c.values + j * c.stride + column, b.stride, c.stride);
    for (; j + 2 <= rows; j += 2)
      small_block<2, ADD>(a.values + j * a.row_step, a.row_step, a.step, depth, of_b,
                          c.values + j * c.stride + column, b.stride, c.stride);
    for (; j < rows; j++)
      small_block<1, ADD>(a.values + j * a.row_step, a.row_step, a.step, depth, of_b,
                          c.values + j * c.stride + column, b.stride, c.stride);
  }
}

template <class T>
inline void widen(const T* from, int width, float scale, float* to, long room) {
  for (int i = 0; i < room; i += LANES)
    store(to + i, width - i >= LANES ? load(from + i) * scale : load_part(from + i, std::max(0, width - i)) * scale);
}

// scores[0:count] → softmax weights, and zeros behind them up to `room`.
inline void soften_row(float* scores, int count, long room) {
  for (long i = count; i < room; i++) scores[i] = -INFINITY;
  float largest = -INFINITY;
  for (int i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
  vec totals = {};
  for (long i = 0; i < room; i += LANES) {
    const vec weights = exp_negative(load(scores + i) - largest);
    store(scores + i, weights);
    totals += weights;
  }
  const float scale = 1 / sum(totals);
  for (long i = 0; i < room; i += LANES) store(scores + i, load(scores + i) * scale);
}

// The matrices of one task in float32; rows of a head are `width` long, those of keys `room`.
template <class T>
class RowTask {
 public:
  RowTask(const RowAttention<T>& p, const RowSegment& s, int kv_head)
      : p_(p), s_(s), kv_head_(kv_head), num_keys_(s.prefix + s.length), width_(padded(p.head_dim)),
        room_(padded(num_keys_)) {}

  void forward() {
    static thread_local Scratch scratch;
    float* at = scratch.get<float>(p_.head_dim * room_ + num_keys_ * width_ + QUERIES * (room_ + 2 * width_));
    const Rows keys = take(at, p_.head_dim, room_), values = take(at, num_keys_, width_);
    const Rows q = take(at, QUERIES, width_), weights = take(at, QUERIES, room_), out = take(at, QUERIES, width_);
    read_columns(p_.k, keys);
    read_rows(p_.v, values);
    for_queries([&](long token, int head, int first, int count) {
      soften(keys, q, weights, token, head, first, count);
      small_product<false>({weights.values, room_, 1}, values, out, count, seen(first, count), width_);
      write(p_.out, out, token, head, count, 1);
    });
  }

  // sums: of the keys and of the values, (keys, width) each.
  void backward(const RowGradient<T>& g, float* sums) {
    static thread_local Scratch scratch;
    float* at = scratch.get<float>(2 * p_.head_dim * room_ + num_keys_ * width_ + QUERIES * (2 * room_ + 3 * width_));
    const Rows turned = take(at, p_.head_dim, room_), values = take(at, p_.head_dim, room_);
    const Rows keys = take(at, num_keys_, width_), q = take(at, QUERIES, width_), grad = take(at, QUERIES, width_);
    const Rows dq = take(at, QUERIES, width_), weights = take(at, QUERIES, room_), slopes = take(at, QUERIES, room_);
    const Rows dk = take(sums, num_keys_, width_), dv = take(sums, num_keys_, width_);
    read_columns(p_.k, turned);
    read_columns(p_.v, values);
    read_rows(p_.k, keys);
    std::fill(dk.values, dk.values + 2 * num_keys_ * width_, 0.f);
    for_queries([&](long token, int head, int first, int count) {
      const int all = seen(first, count);
      soften(turned, q, weights, token, head, first, count);
      read_queries(g.grad, grad, token, head, count, 1);
      small_product<false>({grad.values, width_, 1}, values, slopes, count, p_.head_dim, all);
      for (int i = 0; i < count; i++)
        slope_row(weights.values + i * room_, slopes.values + i * room_, seen(first, i + 1), padded(all));
      small_product<false>({slopes.values, room_, 1}, keys, dq, count, all, width_);
      small_product<true>({weights.values, 1, room_}, grad, dv, all, count, width_);
      small_product<true>({slopes.values, 1, room_}, q, dk, all, count, width_);
      write(g.dq, dq, token, head, count, p_.scale);
    });
  }

 private:
  static Rows take(float*& at, long rows, long stride) {
    const Rows found{at, stride};
    at += rows * stride;
    return found;
  }
  int seen(int first, int count) const { return s_.prefix + first + count; }
  long token_of(int key) const { return key < s_.prefix ? s_.prefix_start + key : s_.start + key - s_.prefix; }
  const T* key_at(const T* from, int key) const {
    return from + (token_of(key) * p_.num_kv_heads + kv_head_) * p_.head_dim;
  }
  void read_rows(const T* from, Rows to) const {
    for (int i = 0; i < num_keys_; i++) widen(key_at(from, i), p_.head_dim, 1, to.values + i * to.stride, width_);
  }
  void read_columns(const T* from, Rows to) const {
    for (int i = 0; i < num_keys_; i++) {
      const T* key = key_at(from, i);
      for (int d = 0; d < p_.head_dim; d++) to.values[d * to.stride + i] = value(key[d]);
    }
    for (int d = 0; d < p_.head_dim; d++)
      for (long i = num_keys_; i < room_; i++) to.values[d * to.stride + i] = 0;
  }
  void read_queries(const T* from, Rows to, long token, int head, int count, float scale) const {
    for (int i = 0; i < count; i++)
      widen(from + ((token + i) * p_.num_heads + head) * p_.head_dim, p_.head_dim, scale, to.values + i * width_, width_);
  }
  void write(T* to, Rows from, long token, int head, int count, float scale) const {
    for (int i = 0; i < count; i++)
      for (int d = 0; d < p_.head_dim; d += LANES)
        store_up_to(to + ((token + i) * p_.num_heads + head) * p_.head_dim + d,
                    load(from.values + i * width_ + d) * scale, p_.head_dim - d);
  }
  template <class Body>
  void for_queries(const Body& body) const {
    const int group = p_.num_heads / p_.num_kv_heads;
    for (int head = kv_head_ * group; head < (kv_head_ + 1) * group; head++)
      for (int first = 0; first < s_.length; first += QUERIES)
        body(s_.start + first, head, first, std::min(QUERIES, s_.length - first));
  }
  // q: the queries, scaled; weights: of the keys that each sees.
  void soften(Rows keys, Rows q, Rows weights, long token, int head, int first, int count) const {
    const int all = seen(first, count);
    read_queries(p_.q, q, token, head, count, p_.scale);
    small_product<false>({q.values, width_, 1}, keys, weights, count, p_.head_dim, all);
    for (int i = 0; i < count; i++) soften_row(weights.values + i * room_, seen(first, i + 1), padded(all));
  }
  // slopes, the gradient of `weights`, → that of the scores.
  static void slope_row(const float* weights, float* slopes, int count, long room) {
    for (long i = count; i < room; i++) slopes[i] = 0;
    vec totals = {};
    for (long i = 0; i < room; i += LANES) totals += load(weights + i) * load(slopes + i);
    const float pull = sum(totals);
    for (long i = 0; i < room; i += LANES) store(slopes + i, load(weights + i) * (load(slopes + i) - pull));
  }

  const RowAttention<T>& p_;
  const RowSegment& s_;
  const int kv_head_, num_keys_;
  const long width_, room_;
};

template <class T>
long row_work(const RowAttention<T>& p) {
  long pairs = 0;
  for (int i = 0; i < p.num_segments; i++) pairs += long(p.segments[i].length) * (p.segments[i].prefix + p.segments[i].length);
  return pairs * p.num_heads * p.head_dim;
}

template <class T>
void row_attention(const RowAttention<T>& p, int num_threads) {
  if (row_work(p) < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(long(p.num_segments) * p.num_kv_heads, 1, num_threads, [&](long begin, long end) {
    for (long task = begin; task < end; task++)
      RowTask<T>(p, p.segments[task / p.num_kv_heads], int(task % p.num_kv_heads)).forward();
  });
}

// The gradients of a segment's own keys and values: its own sums, and those of segments that share it.
template <class T>
void write_key_gradients(const RowAttention<T>& p, const RowGradient<T>& g, int index, const long* starts,
                         const float* sums) {
  static thread_local std::vector<int> sharing;
  const RowSegment& s = p.segments[index];
  sharing.clear();
  for (int i = 0; i < p.num_segments; i++)
    if (p.segments[i].prefix > 0 && p.segments[i].prefix_start == s.start) sharing.push_back(i);
  const long width = padded(p.head_dim);
  const auto found = [&](int segment, int kv_head, int part, int key) {
    const long num_keys = p.segments[segment].prefix + p.segments[segment].length;
    return sums + starts[segment] + ((2L * kv_head + part) * num_keys + key) * width;
  };
  for (int kv_head = 0; kv_head < p.num_kv_heads; kv_head++)
    for (int i = 0; i < s.length; i++)
      for (int part = 0; part < 2; part++) {
        T* to = (part ? g.dv : g.dk) + (long(s.start + i) * p.num_kv_heads + kv_head) * p.head_dim;
        for (int d = 0; d < p.head_dim; d += LANES) {
          vec total = load(found(index, kv_head, part, s.prefix + i) + d);
          for (const int other : sharing)
            if (i < p.segments[other].prefix) total += load(found(other, kv_head, part, i) + d);
          store_up_to(to + d, total, p.head_dim - d);
        }
      }
}

template <class T>
void row_attention_gradient(const RowAttention<T>& p, const RowGradient<T>& g, int num_threads) {
  static thread_local Scratch scratch;
  static thread_local std::vector<long> own_starts;
  const long width = padded(p.head_dim);
  own_starts.assign(1, 0);
  for (int i = 0; i < p.num_segments; i++)
    own_starts.push_back(own_starts.back() + 2 * width * p.num_kv_heads * (p.segments[i].prefix + p.segments[i].length));
  float* sums = scratch.get<float>(own_starts.back());
  const long* starts = own_starts.data();  // the caller's, seen by every thread
  if (row_work(p) < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(long(p.num_segments) * p.num_kv_heads, 1, num_threads, [&](long begin, long end) {
    for (long task = begin; task < end; task++) {
      const long index = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
      const long size = (starts[index + 1] - starts[index]) / p.num_kv_heads;
      RowTask<T>(p, p.segments[index], int(kv_head)).backward(g, sums + starts[index] + kv_head * size);
    }
  });
  Pool::get().run(p.num_segments, 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) write_key_gradients(p, g, int(i), starts, sums);
  });
}
