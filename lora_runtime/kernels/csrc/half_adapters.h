// Adapters in float16 under bfloat16 activations, in AMX's tiles. No include guard on purpose.
//
// A float16 weight is the sum of two bfloat16, exactly, and A x is to 17 bits: so both products are
// made of bfloat16 and lose nothing that a result rounded to bfloat16 could show. Memory is read at
// the size of float16. Every output is one sum over a token's own elements in one order: it is
// bit-equal whatever rows stand beside.

constexpr int GROUP = 8 * TILE;  // tokens whose A x one thread makes at a time

// What is left of x beyond its upper 16 bits, which are a bfloat16. Of a float16 that is one too.
inline __m512 rest(__m512 x) {
  return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff0000))));
}
inline __m512i upper(__m512 a, __m512 b) {  // the upper halves of a's lanes, then of b's
  alignas(64) static constexpr struct Odd {
    uint16_t index[32];
    constexpr Odd() : index() {
      for (int i = 0; i < 32; i++) index[i] = 2 * i + 1;
    }
  } ODD;
  return _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_load_si512(ODD.index), _mm512_castps_si512(b));
}
inline __m512i upper_pairs(__m512 a, __m512 b) {  // the same, lane by lane: a's, b's, a's, …
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
}
inline __m512 floats(const uint16_t* halves, __mmask16 valid) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, halves));
}
inline __m512 wide(const bf16* x, __mmask16 valid) { return wide(_mm256_maskz_loadu_epi16(valid, x)); }

// Rows of A as the tiles' left side: 16 rows of upper parts, then the 16 of what is left of them.
struct HalfRows {
  const uint16_t* a;
  int num_rows, in;
  void decode(int unit, bf16* to) const {
    for (int half = 0; half < 2; half++, to += HALF) {
      const int first = unit * UNIT + half * UNIT / 2, count = in - first;
      for (int r = 0; r < num_rows; r++) {
        const uint16_t* from = a + long(r) * in + first;
        const __m512 left = floats(from, first_lanes(count)), right = floats(from + 16, first_lanes(count - 16));
        _mm512_store_si512(to + r * 32, upper(left, right));
        _mm512_store_si512(to + HALF / 2 + r * 32, upper(rest(left), rest(right)));
      }
      for (int r = num_rows; r < TILE; r++) {
        _mm512_store_si512(to + r * 32, _mm512_setzero_si512());
        _mm512_store_si512(to + HALF / 2 + r * 32, _mm512_setzero_si512());
      }
    }
  }
};

// Rows 16 of B' as the right side, (2, 16, 16) words for 16 columns: pairs of ranks of upper parts
// twice over, for both parts of A x, then the same of what is left of them.
inline void decode_columns(const uint16_t* b, int num_rows, long width, __mmask16 valid, uint32_t* to) {
  for (int k = 0; k < TILE / 2; k++, b += 2 * width, to += TILE) {
    __m512i high = _mm512_setzero_si512(), low = high;
    if (2 * k < num_rows) {
      const __m512 even = floats(b, valid), odd = floats(b + width, 2 * k + 1 < num_rows ? valid : 0);
      high = upper_pairs(even, odd), low = upper_pairs(rest(even), rest(odd));
    }
    _mm512_store_si512(to, high);
    _mm512_store_si512(to + TILE * TILE / 2, high);
    _mm512_store_si512(to + TILE * TILE, low);
    _mm512_store_si512(to + TILE * TILE * 3 / 2, low);
  }
}

struct Shrink { const Segment* segment; int first, last; };  // A x of entries first to last

// w · A x of up to 16 entries and 16 ranks, from the tiles' sums (of the upper parts of A, then of the
// rest): a row for each token, as `HIDDEN_TILE` says, and zeros behind the last.
inline void write_hidden(const HalfAdapters& p, const float (*sums)[TILE * TILE], int first, int last, bf16* to) {
  __m512i rows[TILE];
  for (int i = 0; i < TILE; i++)
    rows[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_load_ps(sums[0] + i * TILE), _mm512_load_ps(sums[1] + i * TILE)));
  transpose(rows);
  for (int t = 0; t < TILE; t++, to += 2 * TILE) {
    __m512 found = _mm512_setzero_ps();
    if (first + t < last) found = _mm512_mul_ps(_mm512_castsi512_ps(rows[t]), _mm512_set1_ps(p.weights[first + t]));
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(found);
    const __m512 left = _mm512_sub_ps(found, wide(high));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + TILE), (__m256i)_mm512_cvtneps_pbh(left));
  }
}

template <int N>
void shrink_block(Tiles& tiles, const HalfAdapters& p, const Shrink& job, const HalfRows& rows, int block,
                  const uint32_t* x, bf16* decoded, bool is_decoded, int token) {
  const int num_units = (p.in + UNIT - 1) / UNIT;
  const long tile_words = long(num_units) * 2 * WORDS;
  tiles.clear();
  for (int unit = 0; unit < num_units; unit++) {
    bf16* own = decoded + long(unit) * 2 * HALF;
    if (!is_decoded) rows.decode(unit, own);
    tiles.multiply<N>(own, x + token / TILE * tile_words + long(unit) * 2 * WORDS, tile_words);
  }
  alignas(64) float sums[4][TILE * TILE];
  tiles.store(sums);
  const Segment& s = *job.segment;
  for (int i = 0; i < N; i++) {
    const int first = job.first + token + i * TILE;
    bf16* to = p.hidden + (s.hidden + long(first - s.first) / TILE * tiles_of(s.rank) + block) * HIDDEN_TILE;
    write_hidden(p, sums + 2 * i, first, job.last, to);
  }
}

// Ask for `count` float16 that lie behind each other.
ALWAYS_INLINE void prefetch(const uint16_t* from, long count) {
  for (long i = 0; i < count; i += 32) _mm_prefetch(from + i, _MM_HINT_T1);
}

inline void shrink(Tiles& tiles, const HalfAdapters& p, const Shrink& job) {
  static thread_local Scratch arranged, decoded;
  const Segment& s = *job.segment;
  const int num_tokens = job.last - job.first, num_units = (p.in + UNIT - 1) / UNIT;
  const int num_tiles = (num_tokens + TILE - 1) / TILE;
  const long tile_words = long(num_units) * 2 * WORDS;
  prefetch(p.memory + s.extent->a, long(s.rank) * p.in);
  if (job.first == s.first) prefetch(p.memory + s.extent->b, long(s.rank) * s.width);
  uint32_t* x = arranged.get<uint32_t>(num_tiles * tile_words);
  for (int tile = 0; tile < num_tiles; tile++) {
    const int32_t* tokens = p.tokens + job.first + tile * TILE;
    arrange_rows<false>(std::min(TILE, num_tokens - tile * TILE), p.in,
                        [&](int t) { return p.x + long(tokens[t]) * p.in; }, x + tile * tile_words);
  }
  bf16* buffer = decoded.get<bf16>(long(num_units) * 2 * HALF);
  for (int block = 0; block < tiles_of(s.rank); block++) {
    const int rank = block * TILE;
    const HalfRows rows{p.memory + s.extent->a + long(rank) * p.in, std::min(TILE, s.rank - rank), p.in};
    for (int token = 0; token < num_tokens; token += 2 * TILE)
      if (token + TILE < num_tokens) shrink_block<2>(tiles, p, job, rows, block, x, buffer, token > 0, token);
      else shrink_block<1>(tiles, p, job, rows, block, x, buffer, token > 0, token);
  }
}

// base + bias of up to 16 columns of one token.
inline __m512 plain(const HalfAdapters& p, long token, int column, __mmask16 valid) {
  const __m512 base = wide(p.base + token * p.out + column, valid);
  return p.bias ? _mm512_add_ps(base, wide(p.bias + column, valid)) : base;
}

inline void store(const HalfAdapters& p, long token, int column, __mmask16 valid, __m512 y) {
  _mm256_mask_storeu_epi16(p.y + token * p.out + column, valid, (__m256i)_mm512_cvtneps_pbh(y));
}

// delta + weight · ((g − 1) · base + (b − bias)).
inline __m512 shifted(const HalfAdapters& p, const Segment& s, int entry, int column, __mmask16 valid, __m512 delta) {
  const long token = p.tokens[entry];
  const int own = column - s.column;
  __m512 shift = _mm512_setzero_ps();
  if (s.extent->gain >= 0) {
    const __m512 gain = _mm512_maskz_loadu_ps(valid, p.vectors + s.extent->gain + own);
    shift = _mm512_mul_ps(_mm512_sub_ps(gain, _mm512_set1_ps(1)), wide(p.base + token * p.out + column, valid));
  }
  if (s.extent->bias >= 0) {
    __m512 bias = _mm512_maskz_loadu_ps(valid, p.vectors + s.extent->bias + own);
    if (p.bias) bias = _mm512_sub_ps(bias, wide(p.bias + column, valid));
    shift = _mm512_add_ps(shift, bias);
  }
  return _mm512_fmadd_ps(_mm512_set1_ps(p.weights[entry]), shift, delta);
}

// What one adapter gives an entry's token in up to 32 columns: the whole of what the token gets, or
// a part that is added to its sums, which lie from column `begin` on.
inline void write_columns(const HalfAdapters& p, const Segment& s, int entry, int column, int begin, int end,
                          const float* left, const float* right, float* sums) {
  const long token = p.tokens[entry];
  const int place = s.places[token];
  const bool is_shifted = s.extent->gain >= 0 || s.extent->bias >= 0;
  for (int c = column; c < std::min(column + 2 * TILE, end); c += TILE) {
    const __mmask16 valid = first_lanes(end - c);
    __m512 delta = _mm512_load_ps(c == column ? left : right);
    if (is_shifted) delta = shifted(p, s, entry, c, valid, delta);
    if (place == ONE_ADAPTER) {
      store(p, token, c, valid, _mm512_add_ps(plain(p, token, c, valid), delta));
      continue;
    }
    float* own = sums + long(place) * MAX_COLUMNS + (c - begin);
    _mm512_mask_storeu_ps(own, valid, _mm512_add_ps(_mm512_maskz_loadu_ps(valid, own), delta));
  }
}

// y = base + delta of 32 whole columns from `at` on: what nearly all are.
inline void add_whole(const HalfAdapters& p, long at, const float* left, const float* right) {
  const __m512i base = _mm512_loadu_si512(p.base + at);
  const __m512 first = _mm512_add_ps(wide(_mm512_castsi512_si256(base)), _mm512_load_ps(left));
  const __m512 second = _mm512_add_ps(wide(_mm512_extracti64x4_epi64(base, 1)), _mm512_load_ps(right));
  _mm512_storeu_si512(p.y + at, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

template <int M>
void expand_tokens(Tiles& tiles, const HalfAdapters& p, const Segment& s, int first, int column, int begin, int end,
                   const uint32_t* b, float* sums) {
  const int num_blocks = tiles_of(s.rank);
  const bf16* hidden = p.hidden + (s.hidden + long(first - s.first) / TILE * num_blocks) * HIDDEN_TILE;
  tiles.clear();
  for (int block = 0; block < num_blocks; block++)
    tiles.multiply_twice<M>(hidden + block * HIDDEN_TILE, long(num_blocks) * HIDDEN_TILE, b + block * 4 * WORDS);
  alignas(64) float found[4][TILE * TILE];
  tiles.store_left<M>(found);
  const bool is_plain = s.extent->gain < 0 && s.extent->bias < 0 && !p.bias && column + 2 * TILE <= end;
  for (int t = 0; t < std::min(M * TILE, s.last - first); t++) {
    const float* left = found[t / TILE] + t % TILE * TILE;
    const float* right = left + 2 * TILE * TILE;
    const long token = p.tokens[first + t];
    if (is_plain && s.places[token] == ONE_ADAPTER) add_whole(p, token * p.out + column, left, right);
    else write_columns(p, s, first + t, column, begin, end, left, right, sums);
  }
}

inline void expand(Tiles& tiles, const HalfAdapters& p, const Segment& s, int column, int begin, int end, float* sums) {
  static thread_local Scratch decoded;
  uint32_t* b = decoded.get<uint32_t>(tiles_of(s.rank) * 4 * WORDS);
  for (int block = 0; block < tiles_of(s.rank); block++)
    for (int c = column; c < column + 2 * TILE; c += TILE)
      decode_columns(p.memory + s.extent->b + long(block) * TILE * s.width + (c - s.column), s.rank - block * TILE,
                     s.width, first_lanes(end - c), b + (block * 2 + (c > column)) * 2 * WORDS);
  for (int first = s.first; first < s.last; first += 2 * TILE)
    if (first + TILE < s.last) expand_tokens<2>(tiles, p, s, first, column, begin, end, b, sums);
    else expand_tokens<1>(tiles, p, s, first, column, begin, end, b, sums);
}

// Columns begin to end, of one module. What several adapters give a token is summed in float32 and
// rounded once.
inline void apply_columns(Tiles& tiles, const HalfAdapters& p, const Module& m, int begin, int end, float* sums) {
  for (long t = 0; t < p.num_tokens; t++)
    for (int c = begin; c < end && m.places[t] != ONE_ADAPTER; c += TILE) {
      const __mmask16 valid = first_lanes(end - c);
      const __m512 y = plain(p, t, c, valid);
      if (m.places[t] == NO_ADAPTER) store(p, t, c, valid, y);
      else _mm512_mask_storeu_ps(sums + long(m.places[t]) * MAX_COLUMNS + (c - begin), valid, y);
    }
  for (const Segment* s = m.segments; s != m.segments + m.num_segments; s++) {
    if (s + 1 != m.segments + m.num_segments)
      for (int k = 0; k < s[1].rank; k++)
        prefetch(p.memory + s[1].extent->b + long(k) * m.width + (begin - m.column), end - begin);
    for (int c = begin; c < end; c += 2 * TILE) expand(tiles, p, *s, c, begin, end, sums);
  }
  for (long t = 0; t < p.num_tokens; t++)
    for (int c = begin; c < end && m.places[t] >= 0; c += TILE) {
      const __mmask16 valid = first_lanes(end - c);
      store(p, t, c, valid, _mm512_maskz_loadu_ps(valid, sums + long(m.places[t]) * MAX_COLUMNS + (c - begin)));
    }
}

inline void apply_adapters(const HalfAdapters& p, int num_threads) {
  static thread_local std::vector<Shrink> own_shrinks;
  own_shrinks.clear();
  for (const Module& m : *p.modules)
    for (const Segment* s = m.segments; s != m.segments + m.num_segments; s++)
      for (int first = s->first; first < s->last && s->rank > 0; first += GROUP)
        own_shrinks.push_back({s, first, std::min(first + GROUP, s->last)});
  const std::vector<Shrink>& shrinks = own_shrinks;  // the caller's, seen by every thread
  const std::vector<Columns>& columns = *p.columns;
  Pool::get().run(shrinks.size(), 1, num_threads, [&](long begin, long end) {
    Tiles tiles;
    for (long i = begin; i < end; i++) shrink(tiles, p, shrinks[i]);
  });
  Pool::get().run(columns.size(), 1, num_threads, [&](long begin, long end) {
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(p.num_sums * MAX_COLUMNS);
    Tiles tiles;
    for (long i = begin; i < end; i++) apply_columns(tiles, p, *columns[i].module, columns[i].begin, columns[i].end, sums);
  });
}
