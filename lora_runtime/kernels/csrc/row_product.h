// Products of bfloat16 activations with the base's weights on processors that multiply pairs of
// bfloat16 but have no tiles. No include guard on purpose.
//
// 4 rows of the weight are multiplied by 4 tokens at a time. The lanes of a sum hold inputs, not
// tokens, and are added up at the end: so none is idle when there are few tokens, and weights go
// from their codes into registers and are multiplied there. For more tokens a part of the inputs of
// 4 rows is kept, decoded, in the first-level cache, and that part of up to 128 tokens in the second.
// Every output is one sum over the inputs in one order: it is bit-equal whatever rows stand beside.

constexpr int ROWS = 4;
constexpr int KEPT_UNITS = 24;  // of a row, decoded at a time
constexpr int SOME_TOKENS = 16;  // from which the next four rows come in time while four are multiplied
constexpr int MANY_TOKENS = 128;  // that share what is kept

// Consecutive rows of a weight, from row `first` on. halves(r, unit): 64 inputs of row r.
// prefetch(unit, count): ask for a share of the `count` rows from `ahead` on, which are multiplied
// later; once called for every unit, all of them have been asked for.
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

// Units first to last of a row; whether they are its first and its last ones.
struct Part {
  long first, last;
  bool is_first, is_last;
};

// R outputs, from `row` on, of N tokens, from `token` on, by one part of the inputs. halves(r, unit):
// 64 inputs of row r of them. kept: the sums of the parts before, and then with this one, (N, R)
// vectors.
template <int R, int N, class Rows>
ALWAYS_INLINE void multiply_block(const RowJob<bf16>& p, int row, int token, const Part& part, float* kept, const Rows& halves) {
  const long in = p.in;
  const bf16* x = p.x + token * in + part.first * UNIT;
  vec totals[N][R];
  clear(totals);
  for (int i = 0; i < N * R && !part.is_first; i++) totals[i / R][i % R] = load(kept + i * LANES);
  for (long unit = part.first; unit < part.last; unit++, x += UNIT) {
    Halves w[R];
    for (int r = 0; r < R; r++) w[r] = halves(r, unit);
    for (int t = 0; t < N; t++) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(x + t * in);
      const __m512bh right = (__m512bh)_mm512_loadu_si512(x + t * in + UNIT / 2);
      for (int r = 0; r < R; r++) totals[t][r] = (vec)_mm512_dpbf16_ps((__m512)totals[t][r], (__m512bh)w[r].first, left);
      for (int r = 0; r < R; r++) totals[t][r] = (vec)_mm512_dpbf16_ps((__m512)totals[t][r], (__m512bh)w[r].second, right);
    }
  }
  if (!part.is_last) {
    for (int i = 0; i < N * R; i++) store(kept + i * LANES, totals[i / R][i % R]);
    return;
  }
  static_assert(ROWS == RANKS, "lane_sums lays a token's rows side by side");
  bf16 found[NUM_SUMS];
  lane_sums(totals, found);
  for (int t = 0; t < N; t++) std::memcpy(p.y + long(token + t) * p.out + row, found + t * ROWS, R * sizeof(bf16));
}

#define INLINED __attribute__((always_inline))  // of lambdas, which the `inline` of ALWAYS_INLINE does not fit
// Few tokens: rows go through registers.
template <int R, class Rows, class Data>
void multiply_few(const Data& w, const RowJob<bf16>& p, int row, long ahead) {
  const Rows rows(w, p.first_row + row, ahead, p.in);
  const Part whole{0, p.in / UNIT, true, true};
  const auto decoded = [&](int r, long unit) INLINED {
    if (r == 0) rows.prefetch(unit, R);
    return rows.halves(r, unit);
  };
  by_tokens(p.num_tokens, [&](auto n) { multiply_block<R, n>(p, row, 0, whole, nullptr, decoded); });
}

// Tokens from `first` to `last`, by one part of R rows, which the first four of them decode.
template <int R, class Rows, class Data>
void multiply_part(const Data& w, const RowJob<bf16>& p, int row, long ahead, int first, int last, const Part& part, bf16* buffer,
                   float* kept) {
  const Rows rows(w, p.first_row + row, ahead, p.in);
  const auto decoded = [&](int r, long unit) INLINED {
    const Halves h = rows.halves(r, unit);
    if (Rows::IS_DENSE) return h;
    bf16* to = buffer + ((unit - part.first) * R + r) * UNIT;
    _mm512_store_si512(to, h.first);
    _mm512_store_si512(to + UNIT / 2, h.second);
    return h;
  };
  const auto again = [&](int r, long unit) INLINED {
    if (Rows::IS_DENSE) return rows.halves(r, unit);
    const bf16* own = buffer + ((unit - part.first) * R + r) * UNIT;
    return Halves{_mm512_load_si512(own), _mm512_load_si512(own + UNIT / 2)};
  };
  // Each four tokens ask for some of the rows ahead: all at once would wait for each other.
  const long units_each = ((part.last - part.first) * TOKENS + last - first - 1) / (last - first);
  long unit_ahead = part.first;
  const auto ask = [&]() INLINED {
    const long end = std::min(part.last, unit_ahead + units_each);
    for (; unit_ahead < end; unit_ahead++) rows.prefetch(unit_ahead, R);
  };
  ask();
  by_tokens(last - first, [&](auto n) { multiply_block<R, n>(p, row, first, part, kept, decoded); });
  for (int token = first + TOKENS; token < last; token += TOKENS) {
    ask();
    kept += TOKENS * R * LANES;
    by_tokens(last - token, [&](auto n) { multiply_block<R, n>(p, row, token, part, kept, again); });
  }
}
#undef INLINED

// Of the rows of a panel, ROWS at a time and then singly: run(how many as a constant, row, ahead), where
// `ahead` is the row that comes `distance` rows later, in this panel or in the one that begins with
// row `after`.
template <class Run>
inline void by_rows(const RowJob<bf16>& p, int panel, long after, int distance, Run run) {
  const int end = std::min((panel + 1) * PANEL, p.out);
  const auto ahead = [&](int row) {
    const int left = end - distance - row;
    return left > 0 ? long(p.first_row) + row + distance : after - left;
  };
  int row = panel * PANEL;
  for (; row + ROWS <= end; row += ROWS) run(std::integral_constant<int, ROWS>(), row, ahead(row));
  for (; row < end; row++) run(std::integral_constant<int, 1>(), row, ahead(row));
}

// ahead: the first row of the panel that comes next, in this group or another one.
template <class Rows, class Data>
void multiply_panel(const Data& w, const RowJob<bf16>& p, int panel, long ahead) {
  static thread_local Scratch decoded, sums;
  const int distance = p.num_tokens < SOME_TOKENS ? PANEL : ROWS;
  if (p.num_tokens <= TOKENS)
    return by_rows(p, panel, ahead, distance, [&](auto r, int row, long next) { multiply_few<r, Rows>(w, p, row, next); });
  const long units = p.in / UNIT, row_sums = MANY_TOKENS * LANES;
  bf16* buffer = decoded.get<bf16>(ROWS * KEPT_UNITS * UNIT);
  float* kept = sums.get<float>(units > KEPT_UNITS ? PANEL * row_sums : 0);
  for (int first = 0; first < p.num_tokens; first += MANY_TOKENS)
    for (long unit = 0; unit < units; unit += KEPT_UNITS) {
      const Part part{unit, std::min(unit + KEPT_UNITS, units), unit == 0, unit + KEPT_UNITS >= units};
      const int last = std::min(first + MANY_TOKENS, p.num_tokens);
      by_rows(p, panel, ahead, distance, [&](auto r, int row, long next) {
        multiply_part<r, Rows>(w, p, row, next, first, last, part, buffer, kept + row % PANEL * row_sums);
      });
    }
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
  static thread_local std::vector<RowJob<bf16>> jobs_of_all;
  if (Rows::IS_ODD_FIRST) {
    const long count = long(starts[num_groups]) * in;
    bf16* to = arranged.get<bf16>(count);
    Pool::get().run(starts[num_groups], 16, num_threads,
                    [&](long begin, long end) { odd_first(x + begin * in, (end - begin) * in, to + begin * in); });
    x = to;
  }
  find_jobs(y, x, starts, num_groups, in, out, jobs_of_all);
  const Panels<RowJob<bf16>> panels(jobs_of_all, out);
  Pool::get().run(panels.count, 1, num_threads, [&](long begin, long end) {
    for (long i = begin; i < end; i++) multiply_panel<Rows>(w, panels.job(i), panels.number(i), panels.ahead(i));
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
