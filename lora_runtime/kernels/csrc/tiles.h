// Tiles of 16 × 16 sums over pairs of bfloat16: AMX's registers, or, without AMX, the same sums by
// AVX512-BF16 in memory, which only training uses. Compiled for both. No include guard on purpose.

constexpr int TILE = 16;  // outputs and tokens of a tile

#if WITH_AMX
constexpr int HALF = 2 * TILE * UNIT / 2;  // elements of half a unit of two tiles of the left side
constexpr int WORDS = TILE * UNIT / 4;  // words of half a unit of one tile of tokens

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
  template <int M, int N>
  void multiply_rows(const bf16* left, long stride, long next_left, const uint32_t* right, long next_right) {
    for (int i = 0; i < 2 * N; i++)
      if (i % 2 < M) multiply_tile(left + i % 2 * next_left, right + i / 2 * next_right, sums[i], stride / 2);
  }
  static void multiply_tile(const bf16* weights, const uint32_t* x, float* sums, long stride) {
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
};
#endif

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __mmask16 first_lanes(int count) { return count >= 16 ? 0xffff : (1u << std::max(count, 0)) - 1; }
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

#if WITH_AMX
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
#endif
