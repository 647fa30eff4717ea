// One token of a linear recurrence with decay, in place: a state is read and written once.

constexpr int STATE_VECTORS = 4;  // columns of a state that are added up together, in vectors

// `count` columns of vectors from `column` on: see `recurrent_step` in kernels/__init__.py.
template <int COUNT>
inline void state_columns(const RecurrentStep& p, long index, float* state, int column) {
  const int width = p.num_values;
  const float *q = p.q + index * p.num_keys, *k = p.k + index * p.num_keys;
  const float keep = p.keep[index];
  vec given[COUNT], out[COUNT];
  for (int i = 0; i < COUNT; i++) out[i] = vec{};
  for (int i = 0; i < COUNT; i++) given[i] = load(p.v + index * width + column + i * LANES);
  if (p.beta) {
    vec held[COUNT];
    for (int i = 0; i < COUNT; i++) held[i] = vec{};
    for (int key = 0; key < p.num_keys; key++) {
      const float* row = state + long(key) * width + column;
      for (int i = 0; i < COUNT; i++) held[i] = fused(held[i], k[key], load(row + i * LANES));
    }
    for (int i = 0; i < COUNT; i++) given[i] = p.beta[index] * (given[i] - keep * held[i]);
  }
  for (int key = 0; key < p.num_keys; key++) {
    float* row = state + long(key) * width + column;
    for (int i = 0; i < COUNT; i++) {
      const vec s = fused(keep * load(row + i * LANES), k[key], given[i]);
      store(row + i * LANES, s);
      out[i] = fused(out[i], q[key], s);
    }
  }
  for (int i = 0; i < COUNT; i++) store(p.out + index * width + column + i * LANES, out[i]);
}

// The same for the columns that fill no vector.
inline void state_column(const RecurrentStep& p, long index, float* state, int column) {
  const int width = p.num_values;
  const float *q = p.q + index * p.num_keys, *k = p.k + index * p.num_keys;
  const float keep = p.keep[index];
  float given = p.v[index * width + column], out = 0;
  if (p.beta) {
    float held = 0;
    for (int key = 0; key < p.num_keys; key++) held += k[key] * state[long(key) * width + column];
    given = p.beta[index] * (given - keep * held);
  }
  for (int key = 0; key < p.num_keys; key++) {
    float& s = state[long(key) * width + column];
    s = keep * s + k[key] * given;
    out += q[key] * s;
  }
  p.out[index * width + column] = out;
}

inline void recurrent_head(const RecurrentStep& p, long index) {
  const long head = index % p.num_heads, slot = p.slots[index / p.num_heads];
  if (slot < 0) {
    std::fill_n(p.out + index * p.num_values, p.num_values, 0.0f);
    return;
  }
  float* state = p.states + (slot * p.num_heads + head) * p.num_keys * p.num_values;
  int column = 0;
  for (; column + STATE_VECTORS * LANES <= p.num_values; column += STATE_VECTORS * LANES)
    state_columns<STATE_VECTORS>(p, index, state, column);
  for (; column + LANES <= p.num_values; column += LANES) state_columns<1>(p, index, state, column);
  for (; column < p.num_values; column++) state_column(p, index, state, column);
}

inline void recurrent_step(const RecurrentStep& p, int num_threads) {
  const long count = long(p.num_rows) * p.num_heads;
  if (count * p.num_keys * p.num_values < MIN_PARALLEL_WORK) num_threads = 1;
  Pool::get().run(count, ROWS_AT_A_TIME, num_threads, [&](long begin, long end) {
    for (long index = begin; index < end; index++) recurrent_head(p, index);
  });
}
