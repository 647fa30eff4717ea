// Attention over the paged cache, one token and key-value head at a time.

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

// scores[0:count] → unnormalised softmax weights; returns their sum. NaN or ∞ gives NaN.
template <class T>
inline float soften(const Attention<T>& p, float* scores, int count) {
  float largest = -INFINITY, total = 0;
  if (p.softcap > 0)
    for (int i = 0; i < count; i++) scores[i] = p.softcap * std::tanh(scores[i] / p.softcap);
  for (int i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
  for (int i = 0; i < count; i++) scores[i] = exp_negative(scores[i] - largest);
  for (int i = 0; i < count; i++) total += scores[i];
  return total;
}

// N query heads of one token that share a key-value head, over `count` cached positions.
template <int N, class T>
void attend(const Attention<T>& p, const T* q, T* out, const long* slots, int count, float* buffer) {
  const T* queries[N];
  float* scores[N];
  float totals[N];
  for (int j = 0; j < N; j++) queries[j] = q + long(j) * p.head_dim;
  for (int j = 0; j < N; j++) scores[j] = buffer + long(j) * count;
  for (int i = 0; i < count; i++) {
    float found[N];
    dots<N>(p.keys + slots[i], queries, p.head_dim, found);
    for (int j = 0; j < N; j++) scores[j][i] = found[j] * p.scale;
  }
  for (int j = 0; j < N; j++) totals[j] = count > 0 ? soften(p, scores[j], count) : 1;
  for (int d = 0; d < p.head_dim; d += WIDE) {
    const int width = std::min(WIDE, p.head_dim - d);
    float sums[N][WIDE];
    combine<N>(scores, count, width, [&](int i) { return p.values + slots[i] + d; }, sums);
    for (int j = 0; j < N; j++)
      for (int c = 0; c < width; c++) store(out + long(j) * p.head_dim + d + c, sums[j][c] / totals[j]);
  }
}

template <class T>
void attend_token(const Attention<T>& p, int token, int kv_head, long* slots, float* buffer) {
  const int end = p.positions[token] + 1, begin = p.window > 0 ? std::max(0, end - p.window) : 0;
  const int32_t* table = p.tables + long(p.rows[token]) * p.table_width;
  for (int i = begin; i < end; i++) {
    const long slot = long(table[i / p.block_size]) * p.block_size + i % p.block_size;
    slots[i - begin] = (slot * p.num_kv_heads + kv_head) * p.head_dim;
  }
  const int group = p.num_heads / p.num_kv_heads;
  const long at = (long(token) * p.num_heads + kv_head * group) * p.head_dim;
  int head = 0;
  for (; head + TOKENS <= group; head += TOKENS)
    attend<TOKENS>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
  for (; head + 3 <= group; head += 3)
    attend<3>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
  for (; head < group; head++)
    attend<1>(p, p.q + at + head * p.head_dim, p.out + at + head * p.head_dim, slots, end - begin, buffer);
}

template <class T>
void paged_attention(const Attention<T>& p, int num_threads) {
  const long work = long(p.num_tokens) * p.num_heads * p.head_dim * p.block_size;
  if (work < MIN_PARALLEL_WORK) num_threads = 1;
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<long> slots(long(p.table_width) * p.block_size);
    std::vector<float> buffer(TOKENS * slots.size());
#pragma omp for schedule(dynamic, 4)
    for (int task = 0; task < p.num_tokens * p.num_kv_heads; task++)
      attend_token(p, task / p.num_kv_heads, task % p.num_kv_heads, slots.data(), buffer.data());
  }
}
