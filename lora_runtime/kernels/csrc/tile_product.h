// Products of bfloat16 activations with the base's weights in AMX's tiles of 16 × 16 outputs. No
// include guard on purpose.
//
// 32 outputs ("a panel") are multiplied at a time. Their weights are decoded from 4 or 8 bits,
// rounded to bfloat16 and laid in a buffer that stays in the first-level cache; the tiles are then
// multiplied from there. So memory is read at the size of the codes, and no decoded copy is kept.
// Every output is one sum over the inputs in one order: it is bit-equal whatever rows stand beside.

struct FourBit {
  static constexpr bool IS_ODD_FIRST = true;
  const FourBitWeight& w;
  const __m512 code;
  explicit FourBit(const FourBitWeight& weight) : w(weight), code(_mm512_loadu_ps(weight.code)) {}
  ALWAYS_INLINE void decode(int row, int height, int unit, int in, long next, bf16* to) const {
    const float* absmax = w.absmax;  // a copy: the stores below might change what w holds
    if (w.nested_codes) decode_rows(row, height, unit, in, next, to, [&](long block) { return nested_scale(w, block); });
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
      const Halves h = four_bit_halves(own_code, codes, scale(block));
      _mm512_store_si512(to, h.first);
      _mm512_store_si512(to + HALF, h.second);
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
      const Halves h = eight_bit_halves(codes, w.absmax[row + r] / 127);
      _mm512_store_si512(to, h.first);
      _mm512_store_si512(to + HALF, h.second);
    }
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
  Pool::get().run(num_tiles, 2, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) {
      const bf16* first = x + long(tiles[i].first) * in;
      arrange_rows<Weight::IS_ODD_FIRST>(tiles[i].count, in, [&](int t) { return first + long(t) * in; },
                                         words + i * tile_words);
    }
  });
  const Weight w(data);
  const Panels<TileJob> panels(jobs_of_all, out);
  // Several at a time: the tiles are configured for each.
  const long at_a_time = std::max(1L, std::min(8L, panels.count / (4 * std::abs(num_threads))));
  Pool::get().run(panels.count, at_a_time, num_threads, [&](long begin, long end) {
    static thread_local Scratch decoded;
    bf16* buffer = decoded.get<bf16>(most <= 2 * TILE ? 4 * HALF : long(PANEL) * in);
    Tiles registers;
    for (long i = begin; i < end; i++) {
      const TileJob& job = panels.job(i);
      const int panel = panels.number(i);
      const long ahead = panels.ahead(i);
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
