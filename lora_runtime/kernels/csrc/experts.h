// Which tokens go through which experts, and under which adapters: integers, sorted by counting.

// Pairs of token and chosen expert, `per_token` of each token, in the order of expert, then token.
// starts has an entry more than there are experts.
inline void sort_pairs(const int64_t* chosen, int64_t* tokens, int64_t* experts, int64_t* places, int32_t* starts,
                       int num_pairs, int per_token, int num_experts) {
  static thread_local std::vector<int32_t> next;
  next.assign(num_experts + 1, 0);
  for (int i = 0; i < num_pairs; i++) next[chosen[i] + 1]++;
  for (int e = 0; e < num_experts; e++) next[e + 1] += next[e];
  std::copy(next.begin(), next.end(), starts);
  for (int i = 0; i < num_pairs; i++) {
    const int64_t expert = chosen[i], place = next[expert]++;
    tokens[place] = i / per_token;
    experts[place] = expert;
    places[i] = place;
  }
}

// Entries of adapters on tokens, sorted by (slot, replica, token). Their number lies in memory: a
// step that is played again has as many as it finds there.
struct Entries {
  const int32_t *tokens, *slots, *replicas;
  const float* weights;
  const int32_t* count;
};
// The same on pairs: sorted by (slot, replica, expert, token), with what each segment is. There is
// room for max_segments; those behind the last are empty.
struct PairEntries {
  int32_t *pairs, *segments;
  float* weights;
  int32_t* starts;
  int64_t *slots, *replicas, *experts;
  int max_segments;
};

inline void find_segments(const Entries& from, const PairEntries& to, const int64_t* places, const int64_t* experts,
                         int per_token, int num_experts) {
  static thread_local std::vector<int32_t> next;
  int num_segments = 0, end = 0;
  for (int first = 0, last; first < *from.count; first = last) {
    for (last = first + 1; last < *from.count && from.slots[last] == from.slots[first] &&
                           from.replicas[last] == from.replicas[first];)
      last++;
    next.assign(num_experts + 1, 0);
    for (int i = first; i < last; i++)
      for (int k = 0; k < per_token; k++) next[experts[places[long(from.tokens[i]) * per_token + k]] + 1]++;
    const int begin = end;
    for (int e = 0; e < num_experts; e++) {
      const int count = next[e + 1];
      next[e + 1] = end += count, next[e] = end - count;
      if (count == 0) continue;
      to.starts[num_segments] = end - count;
      to.slots[num_segments] = from.slots[first];
      to.replicas[num_segments] = from.replicas[first];
      to.experts[num_segments] = e;
      for (int i = end - count; i < end; i++) to.segments[i] = num_segments;
      num_segments++;
    }
    for (int i = first; i < last && begin < end; i++)
      for (int k = 0; k < per_token; k++) {
        const int64_t pair = places[long(from.tokens[i]) * per_token + k];
        const int at = next[experts[pair]]++;
        to.pairs[at] = int32_t(pair);
        to.weights[at] = from.weights[i];
      }
  }
  std::fill(to.starts + num_segments, to.starts + to.max_segments + 1, end);
  for (int64_t* what : {to.slots, to.replicas, to.experts}) std::fill(what + num_segments, what + to.max_segments, 0);
}

// Where each segment's own expert lies in the blocks of its adapter.
inline void find_extents(Extent* found, const Extent* table, int num_replicas, const int64_t* slots,
                         const int64_t* replicas, const int64_t* experts, int count, long in, long out) {
  for (int i = 0; i < count; i++) {
    Extent& own = found[i] = table[slots[i] * num_replicas + replicas[i]];
    const long expert = experts[i];
    if (own.a >= 0) own.a += expert * own.rank * in;
    if (own.b >= 0) own.b += expert * own.rank * out;
    if (own.gain >= 0) own.gain += expert * out;
    if (own.bias >= 0) own.bias += expert * out;
  }
}
