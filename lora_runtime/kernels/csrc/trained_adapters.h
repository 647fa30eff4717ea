// One adapter in training: y += (x Aᵀ) Bᵀ over its rows, and the gradients of that, in the tiles of
// tiles.h. Compiled with each of its two instruction sets. No include guard on purpose.
//
// Forward and the gradient of x are one scheme: rows are multiplied down to the ranks ("hidden"),
// which are rounded to bfloat16 and multiplied up again. Gradients of A and B are sums over the rows
// and stay float32. Widths are multiples of 32; rows and ranks are filled up with zeros.

constexpr int BLOCK = 2 * TILE;  // tokens of a block, inputs of a row of a tile
constexpr int TILE_WORDS = TILE * TILE;  // of a tile of the right side
constexpr int TILE_VALUES = 2 * TILE_WORDS;  // of a tile of the left side
constexpr int SUM_VALUES = TILE * TILE;
inline int blocks_of(int count) { return (count + BLOCK - 1) / BLOCK; }

// Words of pairs of inputs for the right side, of 16 outputs and 32 inputs a tile: tile (output,
// input) is at output · blocks_of(inputs) + input. Row o of m has the inputs of output o.
inline void pack_rows(const bf16* m, int outputs, int inputs, uint32_t* to) {
  for (int o = 0; o < outputs; o += TILE)
    for (int i = 0; i < inputs; i += BLOCK, to += TILE_WORDS) {
      __m512i rows[TILE];
      for (int r = 0; r < TILE; r++) {
        const __mmask32 valid = o + r < outputs ? first_of_32(inputs - i) : 0;
        rows[r] = _mm512_maskz_loadu_epi16(valid, m + long(o + r) * inputs + i);
      }
      transpose(rows);
      for (int k = 0; k < TILE; k++) _mm512_store_si512(to + k * TILE, rows[k]);
    }
}

// Two rows' values, up to 16 of them, as pairs.
inline __m512i pairs(const bf16* even, const bf16* odd, __mmask16 of_even, __mmask16 of_odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_even, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_odd, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 outputs of 32 inputs of m (inputs, outputs), which begins there, as one tile of `pack_rows`.
inline void pack_pairs(const bf16* m, long outputs, int num_inputs, __mmask16 valid, uint32_t* to) {
  for (int k = 0; k < TILE; k++, m += 2 * outputs, to += TILE) {
    const __mmask16 of_even = 2 * k < num_inputs ? valid : 0, of_odd = 2 * k + 1 < num_inputs ? valid : 0;
    _mm512_store_si512(to, pairs(m, m + outputs, of_even, of_odd));
  }
}

// As `pack_rows`, of the transposed matrix: row i of m has the outputs of input i.
inline void pack_columns(const bf16* m, int outputs, int inputs, uint32_t* to) {
  for (int o = 0; o < outputs; o += TILE)
    for (int i = 0; i < inputs; i += BLOCK, to += TILE_WORDS)
      pack_pairs(m + long(i) * outputs + o, outputs, inputs - i, first_lanes(outputs - o), to);
}

// Rows (tokens, in) are multiplied by `down` to ranks and by `up` to what y (tokens, out) is
// increased by; y may be null. hidden: of every 16 ranks and 32 tokens a tile of the left side, a
// rank's tokens side by side.
struct ThroughRanks {
  bf16* y;
  const bf16* rows;
  const uint32_t *down, *up;
  bf16* hidden;
  int num_tokens, in, out, rank;
};

// The sums of 16 ranks of 32 tokens, rounded: into `rows` (32, ranks), and into a tile of `hidden`.
inline void write_ranks(const float (*sums)[SUM_VALUES], bf16* rows, long stride, bf16* hidden) {
  __m512i first[TILE], second[TILE];
  for (int t = 0; t < TILE; t++) {
    first[t] = _mm512_load_si512(sums[0] + t * TILE), second[t] = _mm512_load_si512(sums[1] + t * TILE);
    _mm256_store_si256(reinterpret_cast<__m256i*>(rows + t * stride), (__m256i)_mm512_cvtneps_pbh((__m512)first[t]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(rows + (TILE + t) * stride), (__m256i)_mm512_cvtneps_pbh((__m512)second[t]));
  }
  transpose(first);
  transpose(second);
  for (int r = 0; r < TILE; r++)
    _mm512_store_si512(hidden + r * BLOCK, (__m512i)_mm512_cvtne2ps_pbh((__m512)second[r], (__m512)first[r]));
}

// y (tokens, width) += 32 columns of 32 tokens' sums, rounded once.
inline void add_columns(const float (*sums)[SUM_VALUES], int num_tokens, bf16* y, long width) {
  for (int t = 0; t < num_tokens; t++, y += width) {
    const float *left = sums[t / TILE] + t % TILE * TILE, *right = left + 2 * SUM_VALUES;
    const __m512i before = _mm512_loadu_si512(y);
    const __m512 first = _mm512_add_ps(wide(_mm512_castsi512_si256(before)), _mm512_load_ps(left));
    const __m512 second = _mm512_add_ps(wide(_mm512_extracti64x4_epi64(before, 1)), _mm512_load_ps(right));
    _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}

inline void block_through_ranks(Tiles& tiles, const ThroughRanks& p, int block) {
  static thread_local Scratch padded, of_ranks;
  alignas(64) float sums[4][SUM_VALUES];
  const int first = block * BLOCK, num_tokens = std::min(BLOCK, p.num_tokens - first);
  const int num_blocks = blocks_of(p.num_tokens), rank_blocks = blocks_of(p.rank), inputs = blocks_of(p.in);
  const long stride = rank_blocks * BLOCK;
  const bf16* rows = p.rows + long(first) * p.in;
  if (num_tokens < BLOCK) {
    bf16* copy = padded.get<bf16>(long(BLOCK) * p.in);
    std::memcpy(copy, rows, long(num_tokens) * p.in * sizeof(bf16));
    std::memset(copy + long(num_tokens) * p.in, 0, long(BLOCK - num_tokens) * p.in * sizeof(bf16));
    rows = copy;
  }
  bf16* ranks = of_ranks.get<bf16>(BLOCK * stride);
  if (tiles_of(p.rank) % 2) std::memset(ranks, 0, BLOCK * stride * sizeof(bf16));
  for (int r = 0; r < tiles_of(p.rank); r++) {
    tiles.clear();
    for (int i = 0; i < inputs; i++)
      tiles.multiply_rows<2, 1>(rows + i * BLOCK, p.in, long(TILE) * p.in, p.down + (long(r) * inputs + i) * TILE_WORDS, 0);
    tiles.store(sums);
    write_ranks(sums, ranks + r * TILE, stride, p.hidden + (long(r) * num_blocks + block) * TILE_VALUES);
  }
  for (int c = 0; p.y && c < p.out; c += BLOCK) {
    const uint32_t* up = p.up + long(c / TILE) * rank_blocks * TILE_WORDS;
    tiles.clear();
    for (int r = 0; r < rank_blocks; r++)
      tiles.multiply_rows<2, 2>(ranks + r * BLOCK, stride, TILE * stride, up + r * TILE_WORDS, long(rank_blocks) * TILE_WORDS);
    tiles.store(sums);
    add_columns(sums, num_tokens, p.y + long(first) * p.out + c, p.out);
  }
}

inline void through_ranks(const ThroughRanks& p, int num_threads) {
  Pool::get().run(blocks_of(p.num_tokens), 1, num_threads, [&](long begin, long end) {
    Tiles tiles;
    for (long block = begin; block < end; block++) block_through_ranks(tiles, p, int(block));
  });
}

// found = Σ_t hidden[t] rows[t]ᵀ over rows (tokens, width): (rank, width), or transposed (width, rank).
struct RankSums {
  float* found;
  const bf16 *hidden, *rows;
  int num_tokens, width, rank;
  bool is_transposed;
};

inline void write_rank_sums(const RankSums& p, const float* sums, int rank, int column) {
  __m512i rows[TILE];
  for (int r = 0; r < TILE; r++) rows[r] = _mm512_load_si512(sums + r * TILE);
  if (!p.is_transposed) {
    for (int r = 0; r < std::min(TILE, p.rank - rank); r++)
      _mm512_storeu_si512(p.found + long(rank + r) * p.width + column, rows[r]);
    return;
  }
  transpose(rows);
  for (int c = 0; c < TILE; c++)
    _mm512_mask_storeu_epi32(p.found + long(column + c) * p.rank + rank, first_lanes(p.rank - rank), rows[c]);
}

// 32 columns of all ranks.
inline void sum_columns(Tiles& tiles, const RankSums& p, int column) {
  static thread_local Scratch packed;
  alignas(64) float sums[4][SUM_VALUES];
  const int num_blocks = blocks_of(p.num_tokens);
  uint32_t* right = packed.get<uint32_t>(long(num_blocks) * 2 * TILE_WORDS);
  for (int block = 0; block < num_blocks; block++)
    for (int i = 0; i < 2; i++)
      pack_pairs(p.rows + long(block) * BLOCK * p.width + column + i * TILE, p.width, p.num_tokens - block * BLOCK,
                 0xffff, right + (block * 2 + i) * TILE_WORDS);
  for (int r = 0; r < tiles_of(p.rank); r++) {
    tiles.clear();
    for (int block = 0; block < num_blocks; block++)
      tiles.multiply_rows<1, 2>(p.hidden + (long(r) * num_blocks + block) * TILE_VALUES, BLOCK, 0,
                                right + block * 2 * TILE_WORDS, TILE_WORDS);
    tiles.store(sums);
    for (int i = 0; i < 2; i++) write_rank_sums(p, sums[2 * i], r * TILE, column + i * TILE);
  }
}

inline void sum_over_rows(const RankSums& of_a, const RankSums& of_b, int num_threads) {
  const int first = of_a.width / BLOCK;
  Pool::get().run(first + of_b.width / BLOCK, 2, num_threads, [&](long begin, long end) {
    Tiles tiles;
    for (long i = begin; i < end; i++)
      if (i < first) sum_columns(tiles, of_a, int(i) * BLOCK);
      else sum_columns(tiles, of_b, int(i - first) * BLOCK);
  });
}

inline void train_adapter(const TrainedAdapter& p, int num_threads) {
  static thread_local Scratch down, up;
  uint32_t* packed_a = down.get<uint32_t>(long(tiles_of(p.rank)) * blocks_of(p.in) * TILE_WORDS);
  uint32_t* packed_b = up.get<uint32_t>(long(tiles_of(p.out)) * blocks_of(p.rank) * TILE_WORDS);
  pack_rows(p.a, p.rank, p.in, packed_a);
  pack_rows(p.b, p.out, p.rank, packed_b);
  through_ranks({p.y, p.x, packed_a, packed_b, p.hidden, p.num_tokens, p.in, p.out, p.rank}, num_threads);
}

inline void adapter_gradients(const TrainedAdapter& p, const AdapterGradients& g, int num_threads) {
  static thread_local Scratch down, up, of_ranks;
  uint32_t* packed_b = down.get<uint32_t>(long(tiles_of(p.rank)) * blocks_of(p.out) * TILE_WORDS);
  uint32_t* packed_a = up.get<uint32_t>(long(tiles_of(p.in)) * blocks_of(p.rank) * TILE_WORDS);
  bf16* hidden = of_ranks.get<bf16>(long(tiles_of(p.rank)) * blocks_of(p.num_tokens) * TILE_VALUES);
  pack_columns(p.b, p.rank, p.out, packed_b);
  if (g.dx) pack_columns(p.a, p.in, p.rank, packed_a);
  through_ranks({g.dx, g.grad, packed_b, packed_a, hidden, p.num_tokens, p.out, p.in, p.rank}, num_threads);
  sum_over_rows({g.da, hidden, p.x, p.num_tokens, p.in, p.rank, false},
                {g.db, p.hidden, g.grad, p.num_tokens, p.out, p.rank, true}, num_threads);
}
