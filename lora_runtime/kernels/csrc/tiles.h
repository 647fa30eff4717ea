// Products of bfloat16 activations with the base's weights, in tiles of 16 × 16 outputs. Compiled
// once with AMX and once with AVX512-BF16 alone. No include guard on purpose.
//
// 32 outputs ("a panel") are multiplied at a time. Their weights are decoded from 4 or 8 bits,
// rounded to bfloat16 and laid in a buffer that stays in the first-level cache; the tiles are then
// multiplied from there. So memory is read at the size of the codes, and no decoded copy is kept.
// Every output is one sum over the inputs in one order: it is bit-equal whatever rows stand beside.

constexpr int TILE = 16;  // outputs and tokens of a tile
constexpr int PANEL = 2 * TILE;  // outputs that share one pass over the activations
constexpr int UNIT = 64;  // inputs that are decoded at a time: one scale of 4-bit codes
constexpr int HALF = PANEL * UNIT / 2;  // elements of a panel's unit that are multiplied together
constexpr int WORDS = TILE * UNIT / 4;  // words of half a unit of one tile of tokens

#if WITH_AMX
// Tile registers: 0 to 3 hold sums, 4 and 5 weights, 6 and 7 activations.
struct Tiles {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Tiles() {
    Configuration c;
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = TILE;
    _tile_loadconfig(&c);
  }
  ~Tiles() { _tile_release(); }
  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Add the product of one unit: weights (2, 32, 32), tokens of one or two tiles (2, 16, 16 words).
  template <int N>
  void multiply(const bf16* weights, const uint32_t* x, long next_tile) {
    for (int half = 0; half < 2; half++, weights += HALF, x += WORDS) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(6, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, weights + HALF / 2, 64);
      _tile_dpbf16ps(1, 5, 6);
      if (N == 1) continue;
      _tile_loadd(7, x + next_tile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  // Add the product of M tiles of the left side, each for both halves of the right one: (2, 16, 16)
  // words of two tiles.
  template <int M>
  void multiply_twice(const bf16* left, long next_left, const uint32_t* right) {
    _tile_loadd(4, left, 64);
    if (M == 2) _tile_loadd(5, left + next_left, 64);
    for (int half = 0; half < 2; half++, right += WORDS) {
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + 2 * WORDS, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (M == 1) continue;
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  // Add the product of M tiles of the left side, whose rows lie `stride` values apart, and N of the
  // right one.
  template <int M, int N>
  void multiply_rows(const bf16* left, long stride, long next_left, const uint32_t* right, long next_right) {
    _tile_loadd(4, left, 2 * stride);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (M == 2) {
      _tile_loadd(5, left + next_left, 2 * stride);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (N == 1) return;
    _tile_loadd(7, right + next_right, 64);
    _tile_dpbf16ps(2, 4, 7);
    if (M == 2) _tile_dpbf16ps(3, 5, 7);
  }
  // The sums: of tile i % 2 of the left side and i / 2 of the right one.
  void store(float (*sums)[TILE * TILE]) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  // Of M tiles of the left side alone.
  template <int M>
  void store_left(float (*sums)[TILE * TILE]) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(2, sums[2], 64);
    if (M == 1) return;
    _tile_stored(1, sums[1], 64);
    _tile_stored(3, sums[3], 64);
  }
};
#else
struct Tiles {
  alignas(64) float sums[4][TILE * TILE];
  void clear() { std::memset(sums, 0, sizeof sums); }
  template <int N>
  void multiply(const bf16* weights, const uint32_t* x, long next_tile) {
    for (int half = 0; half < 2; half++, weights += HALF, x += WORDS)
      for (int i = 0; i < 2 * N; i++)
        multiply_tile(weights + i % 2 * HALF / 2, x + i / 2 * next_tile, sums[i]);
  }
  template <int M>
  void multiply_twice(const bf16* left, long next_left, const uint32_t* right) {
    for (int half = 0; half < 2; half++, right += WORDS)
      for (int i = 0; i < 4; i++)
        if (i % 2 < M) multiply_tile(left + i % 2 * next_left, right + i / 2 * 2 * WORDS, sums[i]);
  }
  template <int M, int N>
  void multiply_rows(const bf16* left, long stride, long next_left, const uint32_t* right, long next_right) {
    for (int i = 0; i < 2 * N; i++)
      if (i % 2 < M) multiply_tile(left + i % 2 * next_left, right + i / 2 * next_right, sums[i], stride / 2);
  }
  static void multiply_tile(const bf16* weights, const uint32_t* x, float* sums, long stride = TILE) {
    __m512 total[TILE];
    for (int n = 0; n < TILE; n++) total[n] = _mm512_load_ps(sums + n * TILE);
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(weights);
    for (int k = 0; k < TILE; k++) {
      const __m512bh tokens = (__m512bh)_mm512_load_si512(x + k * TILE);
      for (int n = 0; n < TILE; n++)
        total[n] = _mm512_dpbf16_ps(total[n], (__m512bh)_mm512_set1_epi32(pairs[n * stride + k]), tokens);
    }
    for (int n = 0; n < TILE; n++) _mm512_store_ps(sums + n * TILE, total[n]);
  }
  void store(float (*to)[TILE * TILE]) { std::memcpy(to, sums, sizeof sums); }
  template <int M>
  void store_left(float (*to)[TILE * TILE]) { store(to); }
};
#endif

inline __mmask32 first_of_32(int count) { return count >= 32 ? ~0u : (1u << std::max(count, 0)) - 1; }

inline void transpose(__m512i* r) {  // 16 × 16 words
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 4-bit codes as bitsandbytes keeps them: two a byte, high nibble first. A unit's odd inputs are
// decoded to its first half and its even inputs to the second; the activations are laid likewise.
struct FourBit {
  static constexpr bool IS_ODD_FIRST = true;
  const FourBitWeight& w;
  const __m512 code;
  explicit FourBit(const FourBitWeight& weight) : w(weight), code(_mm512_loadu_ps(weight.code)) {}
  float nested_scale(long block) const {
    float absmax = w.nested_code[w.nested_codes[block]] * w.absmax[block / 256];
    asm volatile("" : "+x"(absmax));  // rounded before the offset is added
    return absmax + w.nested_offsets[block / 256];
  }
  ALWAYS_INLINE void decode(int row, int height, int unit, int in, long next, bf16* to) const {
    const float* absmax = w.absmax;  // a copy: the stores below might change what w holds
    if (w.nested_codes) decode_rows(row, height, unit, in, next, to, [&](long block) { return nested_scale(block); });
    else decode_rows(row, height, unit, in, next, to, [&](long block) { return absmax[block]; });
  }
  // Codes of the panel from row `next` on, all of which lie in one run, are asked for between the
  // rows: at once they would fill the few places that the first-level cache has for what it waits for.
  template <class Scale>
  ALWAYS_INLINE void decode_rows(int row, int height, int unit, int in, long next, bf16* to, Scale scale) const {
    const int blocks_of_row = in / UNIT;
    long block = long(row) * blocks_of_row + unit;
    const uint8_t* codes = w.packed + block * (UNIT / 2);
    const __m512 own_code = code;
    const uint8_t* ahead = w.packed + (next * in / UNIT + long(unit) * PANEL) * (UNIT / 2);
#pragma GCC unroll 4
    for (int r = 0; r < height; r++, block += blocks_of_row, codes += in / 2, to += 32) {
      if (r % 2 == 0) _mm_prefetch(ahead + r * (UNIT / 2), _MM_HINT_T0);
      const __m512 values = _mm512_mul_ps(own_code, _mm512_set1_ps(scale(block)));
      const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);  // twice: bit 4 is ignored
      const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      _mm512_store_si512(to, _mm512_permutexvar_epi16(bytes, table));
      _mm512_store_si512(to + HALF, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
    }
  }
  // Ask for the scales of unit `unit` of the panel from `row` on.
  ALWAYS_INLINE void prefetch(long row, int unit, int in) const {
    const long block = row * in / UNIT + long(unit) * PANEL;
    if (w.nested_codes) return _mm_prefetch(w.nested_codes + block, _MM_HINT_T1);
    for (int i = 0; i < PANEL; i += 16) _mm_prefetch(w.absmax + block + i, _MM_HINT_T1);
  }
};

struct EightBit {
  static constexpr bool IS_ODD_FIRST = false;
  const EightBitWeight& w;
  explicit EightBit(const EightBitWeight& weight) : w(weight) {}
  void decode(int row, int height, int unit, int in, long, bf16* to) const {
    const int8_t* codes = w.codes + long(row) * in + unit * UNIT;
    for (int r = 0; r < height; r++, codes += in, to += 32) {
      const __m512 scale = _mm512_set1_ps(w.absmax[row + r] / 127);
      for (int half = 0; half < 2; half++) {
        const int8_t* own = codes + half * 32;
        const __m512 first = _mm512_mul_ps(floats(own), scale), second = _mm512_mul_ps(floats(own + 16), scale);
        _mm512_store_si512(to + half * HALF, (__m512i)_mm512_cvtne2ps_pbh(second, first));
      }
    }
  }
  static __m512 floats(const int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
  ALWAYS_INLINE void prefetch(long row, int unit, int in) const {
    const int8_t* codes = w.codes + row * in + long(unit) * PANEL * UNIT;
    for (int i = 0; i < PANEL * UNIT; i += 64) _mm_prefetch(codes + i, _MM_HINT_T1);
  }
};

struct SixteenBit {
  static constexpr bool IS_ODD_FIRST = false;
  const SixteenBitWeight& w;
  explicit SixteenBit(const SixteenBitWeight& weight) : w(weight) {}
  void decode(int row, int height, int unit, int in, long, bf16* to) const {
    const bf16* from = w.values + long(row) * in + unit * UNIT;
    for (int r = 0; r < height; r++, from += in, to += 32) {
      _mm512_store_si512(to, _mm512_loadu_si512(from));
      _mm512_store_si512(to + HALF, _mm512_loadu_si512(from + 32));
    }
  }
  ALWAYS_INLINE void prefetch(long row, int unit, int in) const {
    const bf16* from = w.values + row * in + long(unit) * PANEL * UNIT;
    for (int i = 0; i < PANEL * UNIT; i += 32) _mm_prefetch(from + i, _MM_HINT_T1);
  }
};

// Activations of up to 16 tokens, of `in` values from row(token) on → for every half unit (16, 16)
// words of two inputs.
template <bool IS_ODD_FIRST, class Row>
void arrange_rows(int num_tokens, int in, Row row, uint32_t* to) {
  alignas(64) uint16_t first_index[32], second_index[32];
  for (int i = 0; i < 32; i++) {
    first_index[i] = IS_ODD_FIRST ? 2 * i + 1 : i;
    second_index[i] = IS_ODD_FIRST ? 2 * i : 32 + i;
  }
  const __m512i first_of = _mm512_load_si512(first_index), second_of = _mm512_load_si512(second_index);
  for (int k = 0; k < in; k += UNIT, to += 2 * WORDS) {
    const __mmask32 is_left = first_of_32(in - k), is_right = first_of_32(in - k - 32);
    __m512i first[TILE] = {}, second[TILE] = {};
    for (int t = 0; t < num_tokens; t++) {
      const bf16* from = row(t) + k;
      const __m512i left = _mm512_maskz_loadu_epi16(is_left, from);
      const __m512i right = _mm512_maskz_loadu_epi16(is_right, from + 32);
      first[t] = _mm512_permutex2var_epi16(left, first_of, right);
      second[t] = _mm512_permutex2var_epi16(left, second_of, right);
    }
    transpose(first);
    transpose(second);
    for (int i = 0; i < TILE; i++) {
      _mm512_store_si512(to + i * TILE, first[i]);
      _mm512_store_si512(to + WORDS + i * TILE, second[i]);
    }
  }
}

// sums (outputs, tokens) → y (tokens, out), `height` of 16 outputs and `width` of 16 tokens.
inline void write_tile(const float* sums, bf16* y, int out, int height, int width) {
  __m512i rows[TILE];
  for (int i = 0; i < TILE; i++) rows[i] = _mm512_load_si512(sums + i * TILE);
  transpose(rows);
  const __mmask16 valid = (1u << height) - 1;
  for (int t = 0; t < width; t++)
    _mm256_mask_storeu_epi16(y + long(t) * out, valid, (__m256i)_mm512_cvtneps_pbh((__m512)rows[t]));
}

// Tokens that are multiplied by the same `out` rows of the weight, which begin at `first_row`.
struct TileJob {
  bf16* y;
  const uint32_t* x;  // every tile of tokens as `arrange_rows` lays it
  int num_tokens, in, out, first_row;
  long tile_words() const { return long(in) * TILE / 2; }
};

struct TokenTile { int first, count; };

// ahead: the first row of the panel that is decoded next, in this group or another one.
template <class Weight>
inline void decode_unit(const Weight& w, const TileJob& p, int panel, int unit, long ahead, bf16* to) {
  const int row = panel * PANEL, height = std::min(PANEL, p.out - row);
  w.decode(p.first_row + row, height, unit, p.in, ahead, to);
  w.prefetch(ahead, unit, p.in);
}

template <int N>
inline void write_panel(Tiles& tiles, const TileJob& p, int panel, int token) {
  alignas(64) float sums[4][TILE * TILE];
  tiles.store(sums);
  for (int i = 0; i < 2 * N; i++) {
    const int column = panel * PANEL + i % 2 * TILE, first = token + i / 2 * TILE;
    if (column < p.out)
      write_tile(sums[i], p.y + long(first) * p.out + column, p.out, std::min(TILE, p.out - column),
                 std::min(TILE, p.num_tokens - first));
  }
}

// One or two tiles of tokens: a unit is decoded while the one before it is multiplied.
template <int N, class Weight>
void multiply_few(Tiles& tiles, const Weight& w, const TileJob& p, int panel, long ahead, bf16* buffer) {
  const int num_units = p.in / UNIT;
  tiles.clear();
  decode_unit(w, p, panel, 0, ahead, buffer);
  for (int unit = 0; unit < num_units; unit++) {
    if (unit + 1 < num_units) decode_unit(w, p, panel, unit + 1, ahead, buffer + (unit + 1) % 2 * 2 * HALF);
    tiles.multiply<N>(buffer + unit % 2 * 2 * HALF, p.x + unit * 2 * WORDS, p.tile_words());
  }
  write_panel<N>(tiles, p, panel, 0);
}

template <int N>
void multiply_tokens(Tiles& tiles, const TileJob& p, int panel, int token, const bf16* decoded) {
  const uint32_t* x = p.x + token / TILE * p.tile_words();
  tiles.clear();
  for (int unit = 0; unit < p.in / UNIT; unit++)
    tiles.multiply<N>(decoded + unit * 2 * HALF, x + unit * 2 * WORDS, p.tile_words());
  write_panel<N>(tiles, p, panel, token);
}

// More tokens: the whole panel is decoded once for all.
template <class Weight>
void multiply_many(Tiles& tiles, const Weight& w, const TileJob& p, int panel, long ahead, bf16* buffer) {
  for (int unit = 0; unit < p.in / UNIT; unit++) decode_unit(w, p, panel, unit, ahead, buffer + unit * 2 * HALF);
  int token = 0;
  for (; token + TILE < p.num_tokens; token += 2 * TILE) multiply_tokens<2>(tiles, p, panel, token, buffer);
  if (token < p.num_tokens) multiply_tokens<1>(tiles, p, panel, token, buffer);
}

// Tokens `starts[g]` to `starts[g + 1]` times the weight's rows g · out to (g + 1) · out, for all
// groups g in one go: panels of any of them are a thread's next piece of work.
template <class Weight, class Data>
void tile_product(const Data& data, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in, int out,
                  int num_threads) {
  static thread_local Scratch arranged;
  static thread_local std::vector<TokenTile> tiles_of_all;
  static thread_local std::vector<TileJob> jobs_of_all;
  tiles_of_all.clear();
  jobs_of_all.clear();
  const long tile_words = long(in) * TILE / 2;
  long num_tiles = 0;
  for (int g = 0; g < num_groups; g++) num_tiles += (starts[g + 1] - starts[g] + TILE - 1) / TILE;
  if (num_tiles == 0) return;  // the output layer, in a step that ends no row's prompt
  uint32_t* words = arranged.get<uint32_t>(num_tiles * tile_words);
  int most = 0;
  for (int g = 0; g < num_groups; g++) {
    const int first = starts[g], count = starts[g + 1] - first;
    if (count == 0) continue;
    jobs_of_all.push_back({y + long(first) * out, words + long(tiles_of_all.size()) * tile_words, count, in, out, g * out});
    for (int i = 0; i < count; i += TILE) tiles_of_all.push_back({first + i, std::min(TILE, count - i)});
    most = std::max(most, count);
  }
  const TokenTile* tiles = tiles_of_all.data();
  const TileJob* jobs = jobs_of_all.data();
  Pool::get().run(num_tiles, 2, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) {
      const bf16* first = x + long(tiles[i].first) * in;
      arrange_rows<Weight::IS_ODD_FIRST>(tiles[i].count, in, [&](int t) { return first + long(t) * in; },
                                         words + i * tile_words);
    }
  });
  const Weight w(data);
  const long num_panels = (out + PANEL - 1) / PANEL, num_all = num_panels * long(jobs_of_all.size());
  const long panels = std::max(1L, std::min(8L, num_all / (4 * num_threads)));  // at a time
  Pool::get().run(num_all, panels, num_threads, [&](long begin, long end) {
    static thread_local Scratch decoded;
    bf16* buffer = decoded.get<bf16>(most <= 2 * TILE ? 4 * HALF : long(PANEL) * in);
    Tiles registers;
    for (long i = begin; i < end; i++) {
      const TileJob& job = jobs[i / num_panels];
      const int panel = int(i % num_panels);
      const long next = std::min(i + 1, num_all - 1), ahead = jobs[next / num_panels].first_row + next % num_panels * PANEL;
      if (job.num_tokens <= TILE) multiply_few<1>(registers, w, job, panel, ahead, buffer);
      else if (job.num_tokens <= 2 * TILE) multiply_few<2>(registers, w, job, panel, ahead, buffer);
      else multiply_many(registers, w, job, panel, ahead, buffer);
    }
  });
}

inline void product(const FourBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  tile_product<FourBit>(w, y, x, starts, num_groups, in, out, num_threads);
}
inline void product(const EightBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  tile_product<EightBit>(w, y, x, starts, num_groups, in, out, num_threads);
}
inline void product(const SixteenBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  tile_product<SixteenBit>(w, y, x, starts, num_groups, in, out, num_threads);
}
