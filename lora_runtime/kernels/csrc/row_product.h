// Products of bfloat16 activations with the base's weights on processors that multiply pairs of
// bfloat16 but have no tiles. No include guard on purpose.
//
// 4 rows of the weight are multiplied by 4 tokens at a time. The lanes of a sum hold inputs, not
// tokens, and are added up at the end: so none is idle when there are few tokens, and weights go
// from their codes into registers and are multiplied there. For more tokens the 4 rows are kept,
// decoded, in the first-level cache. Every output is one sum over the inputs in one order: it is
// bit-equal whatever rows stand beside.

constexpr int ROWS = 4;

// Consecutive rows of a weight, from row `first` on. halves(r, unit): 64 inputs of row r.
// prefetch(unit, R): ask for a part of what comes later, from row `ahead` on; all units of R rows
// ask for as much as R rows are.
struct FourBitRows {
  static constexpr bool IS_ODD_FIRST = true, IS_DENSE = false;
  const uint8_t *codes, *codes_ahead;
  const float *absmax, *absmax_ahead;
  __m512 code;
  long units;  // of a row
  FourBitRows(const FourBitWeight& w, long first, long ahead, int in)
      : codes(w.packed + first * in / 2), codes_ahead(w.packed + ahead * in / 2), absmax(w.absmax + first * in / UNIT),
        absmax_ahead(w.absmax + ahead * in / UNIT), code(_mm512_loadu_ps(w.code)), units(in / UNIT) {}
  ALWAYS_INLINE Halves halves(int r, long unit) const {
    return four_bit_halves(code, codes + (r * units + unit) * (UNIT / 2), absmax[r * units + unit]);
  }
  ALWAYS_INLINE void prefetch(long unit, int count) const {
    for (int i = 0; i < count; i += 2) _mm_prefetch(codes_ahead + (unit * count + i) * (UNIT / 2), _MM_HINT_T0);
    _mm_prefetch(absmax_ahead + unit * count, _MM_HINT_T0);
  }
};

// With scales in 8 bits.
struct NestedRows {
  static constexpr bool IS_ODD_FIRST = true, IS_DENSE = false;
  const FourBitWeight w;
  __m512 code;
  long block, block_ahead, units;
  NestedRows(const FourBitWeight& weight, long first, long ahead, int in)
      : w(weight), code(_mm512_loadu_ps(w.code)), block(first * in / UNIT), block_ahead(ahead * in / UNIT),
        units(in / UNIT) {}
  ALWAYS_INLINE Halves halves(int r, long unit) const {
    const long own = block + r * units + unit;
    return four_bit_halves(code, w.packed + own * (UNIT / 2), nested_scale(w, own));
  }
  ALWAYS_INLINE void prefetch(long unit, int count) const {
    const uint8_t* codes = w.packed + (block_ahead + unit * count) * (UNIT / 2);
    for (int i = 0; i < count; i += 2) _mm_prefetch(codes + i * (UNIT / 2), _MM_HINT_T0);
    _mm_prefetch(w.nested_codes + block_ahead + unit * count, _MM_HINT_T0);
  }
};

struct EightBitRows {
  static constexpr bool IS_ODD_FIRST = false, IS_DENSE = false;
  const int8_t *codes, *codes_ahead;
  const float* absmax;
  long in;
  EightBitRows(const EightBitWeight& w, long first, long ahead, int in)
      : codes(w.codes + first * in), codes_ahead(w.codes + ahead * in), absmax(w.absmax + first), in(in) {}
  ALWAYS_INLINE Halves halves(int r, long unit) const {
    return eight_bit_halves(codes + r * in + unit * UNIT, absmax[r] / 127);
  }
  ALWAYS_INLINE void prefetch(long unit, int count) const {
    for (int i = 0; i < count; i++) _mm_prefetch(codes_ahead + (unit * count + i) * UNIT, _MM_HINT_T0);
  }
};

struct SixteenBitRows {
  static constexpr bool IS_ODD_FIRST = false, IS_DENSE = true;
  const bf16 *values, *values_ahead;
  long in;
  SixteenBitRows(const SixteenBitWeight& w, long first, long ahead, int in)
      : values(w.values + first * in), values_ahead(w.values + ahead * in), in(in) {}
  ALWAYS_INLINE Halves halves(int r, long unit) const {
    const bf16* own = values + r * in + unit * UNIT;
    return {_mm512_loadu_si512(own), _mm512_loadu_si512(own + UNIT / 2)};
  }
  ALWAYS_INLINE void prefetch(long unit, int count) const {
    for (int i = 0; i < 2 * count; i++) _mm_prefetch(values_ahead + unit * count * UNIT + i * (UNIT / 2), _MM_HINT_T0);
  }
};

// Tokens that are multiplied by the same `out` rows of the weight, which begin at `first_row`.
struct RowJob {
  bf16* y;
  const bf16* x;  // a unit's odd inputs first, if the weight has them so
  int num_tokens, in, out, first_row;
};

// R outputs, from `row` on, of N tokens, from `token` on. halves(r, unit): 64 inputs of row r of them.
template <int R, int N, class Rows>
ALWAYS_INLINE void multiply_block(const RowJob& p, int row, int token, const Rows& halves) {
  const long in = p.in, units = in / UNIT;
  const bf16* x = p.x + token * in;
  vec totals[N][R] = {};
  for (long unit = 0; unit < units; unit++, x += UNIT) {
    Halves w[R];
    for (int r = 0; r < R; r++) w[r] = halves(r, unit);
    for (int t = 0; t < N; t++) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(x + t * in);
      const __m512bh right = (__m512bh)_mm512_loadu_si512(x + t * in + UNIT / 2);
      for (int r = 0; r < R; r++) totals[t][r] = (vec)_mm512_dpbf16_ps((__m512)totals[t][r], (__m512bh)w[r].first, left);
      for (int r = 0; r < R; r++) totals[t][r] = (vec)_mm512_dpbf16_ps((__m512)totals[t][r], (__m512bh)w[r].second, right);
    }
  }
  vec of_tokens[TOKENS] = {};
  for (int t = 0; t < N; t++) of_tokens[t] = quarter_sums<R>(totals[t]);
  bf16 found[TOKENS * ROWS];
  store(found, whole_sums(of_tokens));
  for (int t = 0; t < N; t++) std::memcpy(p.y + long(token + t) * p.out + row, found + t * ROWS, R * sizeof(bf16));
}

#define INLINED __attribute__((always_inline))
template <int R, class Rows, class Data>
void multiply_rows(const Data& w, const RowJob& p, int row, long ahead, bf16* buffer) {
  const Rows rows(w, p.first_row + row, ahead, p.in);
  const auto decoded = [&](int r, long unit) INLINED {
    if (r == 0) rows.prefetch(unit, R);
    return rows.halves(r, unit);
  };
  if (p.num_tokens <= TOKENS)
    return by_tokens(p.num_tokens, [&](auto n) { multiply_block<R, n>(p, row, 0, decoded); });
  const auto kept = [&](int r, long unit) INLINED {
    const Halves h = decoded(r, unit);
    if (Rows::IS_DENSE) return h;
    _mm512_store_si512(buffer + (unit * R + r) * UNIT, h.first);
    _mm512_store_si512(buffer + (unit * R + r) * UNIT + UNIT / 2, h.second);
    return h;
  };
  const auto again = [&](int r, long unit) INLINED {
    if (Rows::IS_DENSE) return rows.halves(r, unit);
    const bf16* own = buffer + (unit * R + r) * UNIT;
    return Halves{_mm512_load_si512(own), _mm512_load_si512(own + UNIT / 2)};
  };
  multiply_block<R, TOKENS>(p, row, 0, kept);
  for (int token = TOKENS; token < p.num_tokens; token += TOKENS)
    by_tokens(p.num_tokens - token, [&](auto n) { multiply_block<R, n>(p, row, token, again); });
}
#undef INLINED

// ahead: the first row of the panel that comes next, in this group or another one.
template <class Rows, class Data>
void multiply_panel(const Data& w, const RowJob& p, int panel, long ahead, bf16* buffer) {
  const int end = std::min((panel + 1) * PANEL, p.out);
  int row = panel * PANEL;
  for (; row + ROWS <= end; row += ROWS, ahead += ROWS)
    multiply_rows<ROWS, Rows>(w, p, row, ahead, buffer);
  for (; row < end; row++, ahead++) multiply_rows<1, Rows>(w, p, row, ahead, buffer);
}

// Activations whose every 64 inputs are laid as a unit of 4-bit codes is.
inline void odd_first(const bf16* x, long count, bf16* to) {
  alignas(64) static constexpr struct Order {
    uint16_t odd[32], even[32];
    constexpr Order() : odd(), even() {
      for (int i = 0; i < 32; i++) odd[i] = 2 * i + 1, even[i] = 2 * i;
    }
  } ORDER;
  for (long i = 0; i < count; i += UNIT) {
    const __m512i left = _mm512_loadu_si512(x + i), right = _mm512_loadu_si512(x + i + UNIT / 2);
    _mm512_store_si512(to + i, _mm512_permutex2var_epi16(left, _mm512_load_si512(ORDER.odd), right));
    _mm512_store_si512(to + i + UNIT / 2, _mm512_permutex2var_epi16(left, _mm512_load_si512(ORDER.even), right));
  }
}

// Tokens `starts[g]` to `starts[g + 1]` times the weight's rows g · out to (g + 1) · out, for all
// groups g in one go: panels of any of them are a thread's next piece of work.
template <class Rows, class Data>
void row_product(const Data& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in, int out,
                 int num_threads) {
  static thread_local Scratch arranged;
  static thread_local std::vector<RowJob> jobs_of_all;
  jobs_of_all.clear();
  if (Rows::IS_ODD_FIRST) {
    const long count = long(starts[num_groups]) * in;
    bf16* to = arranged.get<bf16>(count);
    odd_first(x, count, to);
    x = to;
  }
  for (int g = 0; g < num_groups; g++) {
    const int first = starts[g], count = starts[g + 1] - first;
    if (count > 0) jobs_of_all.push_back({y + long(first) * out, x + long(first) * in, count, in, out, g * out});
  }
  const RowJob* jobs = jobs_of_all.data();
  const long num_panels = (out + PANEL - 1) / PANEL, num_all = num_panels * long(jobs_of_all.size());
  const long panels = std::max(1L, std::min(8L, num_all / (4 * num_threads)));  // at a time
  Pool::get().run(num_all, panels, num_threads, [&](long begin, long end) {
    static thread_local Scratch decoded;
    bf16* buffer = decoded.get<bf16>(long(ROWS) * in);
    for (long i = begin; i < end; i++) {
      const RowJob& job = jobs[i / num_panels];
      const long next = std::min(i + 1, num_all - 1), ahead = jobs[next / num_panels].first_row + next % num_panels * PANEL;
      multiply_panel<Rows>(w, job, int(i % num_panels), ahead, buffer);
    }
  });
}

inline void product(const FourBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  if (w.nested_codes) row_product<NestedRows>(w, y, x, starts, num_groups, in, out, num_threads);
  else row_product<FourBitRows>(w, y, x, starts, num_groups, in, out, num_threads);
}
inline void product(const EightBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  row_product<EightBitRows>(w, y, x, starts, num_groups, in, out, num_threads);
}
inline void product(const SixteenBitWeight& w, bf16* y, const bf16* x, const int32_t* starts, int num_groups, int in,
                    int out, int num_threads) {
  row_product<SixteenBitRows>(w, y, x, starts, num_groups, in, out, num_threads);
}
