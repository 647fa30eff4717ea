// Products of float32 activations with the base's weights, whatever they are kept as. No include
// guard on purpose.
//
// 32 rows of the weight are decoded to float32, a part of their inputs at a time, once for all tokens
// and into the first-level cache. The lanes of a vector hold outputs there. Every output is one sum
// over the inputs in one order: it is bit-equal whatever rows stand beside it. Source: the packed
// inner kernel of GotoBLAS (Goto & van de Geijn, 2008).

constexpr int PART = DEPTH;  // inputs that are decoded at a time, whose products are one short sum: 8 KB
constexpr int PANEL_VECTORS = PANEL / LANES;
constexpr int MANY_ROWS = 12 / PANEL_VECTORS;  // tokens whose sums fill 12 registers of the 16 of AVX2

// Adds sums of a panel to the first `width` columns of y, or writes them there if they are the first.
inline void add_columns(float* y, const float* sums, bool are_first, int width) {
  for (int c = 0; c < width; c++) y[c] = are_first ? sums[c] : y[c] + sums[c];
}

// y[t][c] = Σ_k x[t][k] · w[k][c] for N tokens and the first `width` columns, added to what y holds
// unless it `is_first`. w: (count, PANEL), at most PART of them: a number, or PART as a constant, with
// which the loop takes a fifth less time. Meanwhile x and y of as many tokens after these are asked
// for: each part is a short piece of their rows, which no processor foresees.
template <int N, class Count>
inline void multiply_block(const float* x, long x_stride, const float* w, Count count, bool is_first, float* y,
                           long y_stride, int width) {
  constexpr int V = PANEL_VECTORS;
  for (int t = N; t < 2 * N; t++) {
    for (int k = 0; k < count; k += CACHE_LINE / 4) __builtin_prefetch(x + t * x_stride + k);
    for (int c = 0; c < PANEL; c += CACHE_LINE / 4) __builtin_prefetch(y + t * y_stride + c, 1);
  }
  vec sums[N][V];
  clear(sums);
  const int end = count;
#pragma GCC unroll 4
  for (int k = 0; k < end; k++) {
    vec values[N];
    for (int t = 0; t < N; t++) values[t] = filled(x[t * x_stride + k]);
    for (int v = 0; v < V; v++) {
      const vec row = load(w + k * PANEL + v * LANES);
      for (int t = 0; t < N; t++) sums[t][v] = fused(sums[t][v], values[t], row);
    }
  }
  if (width == PANEL) {
    for (int t = 0; t < N; t++)
      for (int v = 0; v < V; v++) {
        float* own = y + t * y_stride + v * LANES;
        store(own, is_first ? sums[t][v] : load(own) + sums[t][v]);
      }
    return;
  }
  float own[N][PANEL];
  for (int t = 0; t < N; t++) {
    for (int v = 0; v < V; v++) store(own[t] + v * LANES, sums[t][v]);
    add_columns(y + t * y_stride, own[t], is_first, width);
  }
}

// A weight that was laid out for this product: (⌈out / PANEL⌉, in, PANEL).
template <class T>
struct PackedPanels {
  static constexpr bool IS_CODED = false;
  const T* panels;
  long in;
  PackedPanels(const PackedWeight<T>& w, int in) : panels(w.panels), in(in) {}
};

#if VECTOR_LEVEL >= 1
// Byte j of 32 rows in columns[j], for 16 of them. Rows 0 to 3, 8 to 11, 16 to 19 and 24 to 27 are in the
// first half of a column, so that what is unpacked from both halves of a vector comes out in order.
ALWAYS_INLINE void transpose_bytes(const uint8_t* const* rows, long at, __m256i (&columns)[16]) {
  __m256i other[16];
  for (int i = 0; i < 16; i++) {
    const int row = i / 4 * 8 + i % 4;
    const auto bytes = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at)); };
    columns[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes(row)), bytes(row + 4), 1);
  }
  // Each round doubles how many bytes of different rows lie side by side.
  const auto join = [](const __m256i (&from)[16], __m256i (&to)[16]) {
    for (int i = 0; i < 8; i++) {
      to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
    }
  };
  join(columns, other);
  join(other, columns);
  join(columns, other);
  join(other, columns);
}

// The rows of a panel; those that the weight lacks are its last one once more.
struct PanelRows {
  const uint8_t* bytes[PANEL];
  PanelRows(const void* weight, long row, int count, long row_bytes) {
    for (int r = 0; r < PANEL; r++)
      bytes[r] = static_cast<const uint8_t*>(weight) + (row + std::min(r, count - 1)) * row_bytes;
  }
};

// Ask for some bytes of `count` rows.
ALWAYS_INLINE void prefetch_rows(const void* weight, long row, int count, long row_bytes, long at, int num_bytes) {
  const uint8_t* own = static_cast<const uint8_t*>(weight) + row * row_bytes + at;
  for (int r = 0; r < count; r++, own += row_bytes)
    for (int i = 0; i < num_bytes; i += CACHE_LINE) __builtin_prefetch(own + i, 0, 2);
}

// 16 values of float32 that are looked up by their places in registers.
class ValueTable {
 public:
  explicit ValueTable(const float* values) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; i++)
      for (int plane = 0; plane < 4; plane++) std::memcpy(&bytes[plane][i], reinterpret_cast<const uint8_t*>(values + i) + plane, 1);
    for (int plane = 0; plane < 4; plane++)
      planes_[plane] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[plane])));
  }
  // places: one a byte, of 32 values in the order of `transpose_bytes`.
  ALWAYS_INLINE void look_up(__m256i places, __m256 (&found)[4]) const {
    __m256i bytes[4];
    for (int plane = 0; plane < 4; plane++) bytes[plane] = _mm256_shuffle_epi8(planes_[plane], places);
    const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; i++) {
      found[2 * i] = (__m256)_mm256_unpacklo_epi16(low[i], high[i]);
      found[2 * i + 1] = (__m256)_mm256_unpackhi_epi16(low[i], high[i]);
    }
  }

 private:
  __m256i planes_[4];  // the first, second, ... byte of every value, twice
};

// 32 values times their rows' scales.
ALWAYS_INLINE void scale_rows(__m256 (&values)[4], const float* scales) {
  for (int i = 0; i < 4; i++) values[i] = _mm256_mul_ps(values[i], _mm256_load_ps(scales + 8 * i));
}

class FourBitPanels {
 public:
  static constexpr bool IS_CODED = true;
  FourBitPanels(const FourBitWeight& w, int in) : w_(w), in_(in), table_(w.code) {}
  // Hands over the values of `num_inputs` inputs from `first` on, one after another, of the `count`
  // rows from `row` on: take(32 values). Meanwhile those of the rows from `ahead` on are asked for.
  template <class Take>
  ALWAYS_INLINE void visit(long row, int count, long ahead, int first, int num_inputs, Take take) const {
    const PanelRows rows(w_.packed, row, count, in_ / 2);
    prefetch_rows(w_.packed, ahead, count, in_ / 2, first / 2, num_inputs / 2);
    const long row_blocks = in_ / BLOCK;
    prefetch_scales(ahead * row_blocks + first / BLOCK * count, num_inputs / BLOCK * count);
    for (int k = first; k < first + num_inputs; k += BLOCK) {
      alignas(64) float scales[PANEL];
      long block = row * row_blocks + k / BLOCK;
      for (int r = 0; r < PANEL; r++, block += r < count ? row_blocks : 0) scales[r] = block_scale(w_, block);
      for (int at = k / 2; at < (k + BLOCK) / 2; at += 16) {
        __m256i columns[16];
        transpose_bytes(rows.bytes, at, columns);
        for (int i = 0; i < 16; i++)
          for (int nibble = 4; nibble >= 0; nibble -= 4) {
            __m256 values[4];
            table_.look_up(_mm256_and_si256(_mm256_srli_epi16(columns[i], nibble), _mm256_set1_epi8(15)), values);
            scale_rows(values, scales);
            take(values);
          }
      }
    }
  }

 private:
  static constexpr int BLOCK = 64;  // inputs that share a scale
  // Ask for the scales of `count` blocks.
  ALWAYS_INLINE void prefetch_scales(long block, int count) const {
    const int line = w_.nested_codes ? CACHE_LINE : CACHE_LINE / 4;
    for (int i = 0; i < count; i += line)
      if (w_.nested_codes) __builtin_prefetch(w_.nested_codes + block + i, 0, 2);
      else __builtin_prefetch(w_.absmax + block + i, 0, 2);
  }
  const FourBitWeight& w_;
  const long in_;
  const ValueTable table_;
};

class EightBitPanels {
 public:
  static constexpr bool IS_CODED = true;
  EightBitPanels(const EightBitWeight& w, int in) : w_(w), in_(in) {}
  // As that of 4-bit codes.
  template <class Take>
  ALWAYS_INLINE void visit(long row, int count, long ahead, int first, int num_inputs, Take take) const {
    const PanelRows rows(w_.codes, row, count, in_);
    prefetch_rows(w_.codes, ahead, count, in_, first, num_inputs);
    alignas(64) float scales[PANEL];
    for (int r = 0; r < PANEL; r++) scales[r] = w_.absmax[row + std::min(r, count - 1)] / 127;
    for (int at = first; at < first + num_inputs; at += 16) {
      __m256i columns[16];
      transpose_bytes(rows.bytes, at, columns);
      for (int i = 0; i < 16; i++) {
        const __m256i none = _mm256_setzero_si256();  // a code goes to the upper end of 16, then 32 bits
        const __m256i low = _mm256_unpacklo_epi8(none, columns[i]), high = _mm256_unpackhi_epi8(none, columns[i]);
        const __m256i wide[4] = {_mm256_unpacklo_epi16(none, low), _mm256_unpackhi_epi16(none, low),
                                 _mm256_unpacklo_epi16(none, high), _mm256_unpackhi_epi16(none, high)};
        __m256 values[4];
        for (int j = 0; j < 4; j++) values[j] = _mm256_cvtepi32_ps(_mm256_srai_epi32(wide[j], 24));
        scale_rows(values, scales);
        take(values);
      }
    }
  }

 private:
  const EightBitWeight& w_;
  const long in_;
};
#endif

// The values of `num_inputs` inputs from `first` on of the `count` rows from `row` on: in `to`, unless
// they lie in memory as float32. Those that are decoded next are asked for: bit by bit, as a processor
// drops what it is asked for beyond what it can wait for.
template <class T>
const float* decode(const PackedPanels<T>& weight, long row, int, long, int first, int num_inputs, float* to) {
  const T* own = weight.panels + (row * weight.in + first * PANEL);
  if constexpr (std::is_same<T, float>::value) return own;
  else {
    for (int i = 0; i < num_inputs * PANEL; i += LANES) {
      __builtin_prefetch(own + num_inputs * PANEL + i, 0, 2);
      store(to + i, load(own + i));
    }
    return to;
  }
}
#if VECTOR_LEVEL >= 1
template <class Weight>
const float* decode(const Weight& weight, long row, int count, long ahead, int first, int num_inputs, float* to) {
  weight.visit(row, count, ahead, first, num_inputs, [next = to](const __m256 (&values)[4]) mutable {
    for (int i = 0; i < 4; i++, next += 8) _mm256_store_ps(next, values[i]);
  });
  return to;
}

// One token by a panel's codes, whose values stay in registers. The sums are those of `multiply_block`.
template <class Weight>
void multiply_one(const Weight& weight, const RowJob<float>& p, int column, int width, long ahead) {
  for (int first = 0; first < p.in; first += PART) {
    __m256 sums[4] = {};
    weight.visit(p.first_row + column, width, ahead, first, PART, [&sums, x = p.x + first](const __m256 (&values)[4]) mutable {
      const __m256 value = _mm256_set1_ps(*x++);
      for (int i = 0; i < 4; i++) sums[i] = _mm256_fmadd_ps(value, values[i], sums[i]);
    });
    float own[PANEL];
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(own + 8 * i, sums[i]);
    add_columns(p.y + column, own, first == 0, width);
  }
}
#endif

// The outputs of one panel of a job's rows. ahead: the first row of the panel that comes next.
template <class Weight>
void multiply_panel(const Weight& weight, const RowJob<float>& p, int panel, long ahead) {
  alignas(64) float decoded[PART * PANEL];
  const int column = panel * PANEL, width = std::min(PANEL, p.out - column);
#if VECTOR_LEVEL >= 1
  if constexpr (Weight::IS_CODED)
    if (p.num_tokens == 1) return multiply_one(weight, p, column, width, ahead);
#endif
  for (int first = 0; first < p.in; first += PART) {
    const int count = std::min(PART, p.in - first);
    const float* w = decode(weight, p.first_row + column, width, ahead, first, count, decoded);
    const auto multiply = [&](auto n, int t) {
      const auto by = [&](auto own) {
        multiply_block<n>(p.x + long(t) * p.in + first, p.in, w, own, first == 0, p.y + long(t) * p.out + column, p.out,
                          width);
      };
      if (count == PART) by(std::integral_constant<int, PART>());
      else by(count);
    };
    int t = 0;
    for (; t + MANY_ROWS <= p.num_tokens; t += MANY_ROWS) multiply(std::integral_constant<int, MANY_ROWS>(), t);
    for (; t + 2 <= p.num_tokens; t += 2) multiply(std::integral_constant<int, 2>(), t);
    for (; t < p.num_tokens; t++) multiply(std::integral_constant<int, 1>(), t);
  }
}

// Tokens `starts[g]` to `starts[g + 1]` times the weight's rows g · out to (g + 1) · out, for all
// groups g in one go: panels of any of them are a thread's next piece of work.
template <class Weight>
void multiply_groups(const Weight& weight, float* y, const float* x, const int32_t* starts, int num_groups, int in, int out,
                     int num_threads) {
  static thread_local std::vector<RowJob<float>> jobs_of_all;
  find_jobs(y, x, starts, num_groups, in, out, jobs_of_all);
  const Panels<RowJob<float>> panels(jobs_of_all, out);
  Pool::get().run(panels.count, 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) multiply_panel(weight, panels.job(i), panels.number(i), panels.ahead(i));
  });
}

template <class T>
void product(const PackedWeight<T>& w, float* y, const float* x, const int32_t* starts, int num_groups, int in, int out,
             int num_threads) {
  multiply_groups(PackedPanels<T>(w, in), y, x, starts, num_groups, in, out, num_threads);
}
#if VECTOR_LEVEL >= 1
inline void product(const FourBitWeight& w, float* y, const float* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  multiply_groups(FourBitPanels(w, in), y, x, starts, num_groups, in, out, num_threads);
}
inline void product(const EightBitWeight& w, float* y, const float* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  multiply_groups(EightBitPanels(w, in), y, x, starts, num_groups, in, out, num_threads);
}
#endif
