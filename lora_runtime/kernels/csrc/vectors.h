// Kernel bodies, compiled once for every instruction set by cpu.cpp. No include guard on purpose.
//
// A value never depends on the block it was computed in: every sum runs over one token's own
// elements in one fixed order, so a row's result is bit-equal whatever rows stand beside it.

// GCC takes a function that only prefetches for one without effects, and drops the call: such
// functions are inlined by force.
#undef ALWAYS_INLINE
#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int LANES = VECTOR_BYTES / 4;  // floats of a vector
constexpr int WIDE = 2 * LANES;  // floats a step; two vectors keep both multipliers busy
constexpr int DEPTH = 64;  // products summed before they join the total: short sums round less
constexpr int RANKS = 4;  // rows of A that share each load of a token
#if VECTOR_LEVEL >= 2
constexpr int TOKENS = 4;  // that share each load
constexpr int MAX_TOTALS = 16;  // vectors that hold sums at a time, of 32 registers
#else
constexpr int TOKENS = 3;  // whose sums by four rows leave 4 of 16 registers
constexpr int MAX_TOTALS = 12;
#endif
constexpr int MOST_TOKENS = 4;  // that share each load of at most MAX_TOTALS / MOST_TOKENS rows
constexpr int NUM_SUMS = (MOST_TOKENS * RANKS + LANES - 1) / LANES * LANES;  // that `lane_sums` writes

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t bits32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t bits16 __attribute__((vector_size(VECTOR_BYTES / 2)));

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {  // round to nearest even, keep NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16* to, vec x) {
#if VECTOR_LEVEL == 3
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &rounded, sizeof rounded);
#else
  bits32 bits = (bits32)x;
  bits = x != x ? bits32{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if VECTOR_LEVEL >= 2  // by name: GCC widens and narrows in several steps where one or two do it
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits));
#elif VECTOR_LEVEL == 1
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const bits16 narrow = __builtin_convertvector(bits, bits16);
  std::memcpy(to, &narrow, sizeof narrow);
#endif
#endif
}
inline vec load(const float* from) {
  vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline vec load(const bf16* from) {
#if VECTOR_LEVEL >= 2
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif VECTOR_LEVEL == 1
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  bits16 narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const bits32 wide = __builtin_convertvector(narrow, bits32) << 16;
  vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
#endif
}
// sums + a · b, rounded once. By name: left to itself the compiler fuses in some of the blocks that a
// row may be computed in and not in others.
inline vec fused(vec sums, vec a, vec b) {
#if VECTOR_LEVEL >= 2
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sums);
#elif VECTOR_LEVEL == 1
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums);
#else
  return sums + a * b;
#endif
}
inline vec filled(float x) {
#if VECTOR_LEVEL >= 2
  return (vec)_mm512_set1_ps(x);
#elif VECTOR_LEVEL == 1
  return (vec)_mm256_set1_ps(x);
#else
  return vec{} + x;
#endif
}
inline vec fused(vec sums, float a, vec b) { return fused(sums, filled(a), b); }
#if VECTOR_LEVEL >= 2
inline vec load(const float16* from) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline vec load_part(const float16* from, int width) {
  const __mmask16 valid = width >= LANES ? 0xffff : (1 << std::max(width, 0)) - 1;
  return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, from));
}
#endif
template <class T>
inline vec load_part(const T* from, int width) {
  vec v = {};
  for (int i = 0; i < width; i++) v[i] = value(from[i]);
  return v;
}
// The lanes' sum: halves are added until one lane is left.
inline float sum(vec v) {
#if VECTOR_LEVEL >= 2
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif VECTOR_LEVEL == 1
  const __m256 half = (__m256)v;
#endif
#if VECTOR_LEVEL > 0
  __m128 rest = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  rest = _mm_add_ps(rest, _mm_movehl_ps(rest, rest));
  return _mm_cvtss_f32(_mm_add_ss(rest, _mm_movehdup_ps(rest)));
#else
  float parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
#endif
}

// Zeros, one by one, so that they stay in registers. A whole array of them (`= {}`) GCC writes to
// memory by `rep stos`, which takes as long as a hundred products, and reads it again.
template <int N, int M>
ALWAYS_INLINE void clear(vec (&sums)[N][M]) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < M; j++) sums[i][j] = vec{};
}

// exp(x) for x ≤ 0 within 2 ulp; 0 below -87; NaN stays (Cephes' polynomial).
inline vec exp_negative(vec x) {
  const vec y = x < -87.f ? vec{} - 87.f : x;
  const ints n = __builtin_convertvector(y * 1.44269504f - 0.5f, ints);  // rounded: it is negative
  const vec whole = __builtin_convertvector(n, vec), r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vec e = (p * r * r + r + 1.f) * (vec)((n + 127) << 23);
  return x != x ? x : x < -87.f ? vec{} : e;
}

// `sums`: lane i is the sum of all lanes of parts[i]. Which values are added in which order is the
// same for every lane. `parts` may be overwritten.
#if VECTOR_LEVEL >= 2
// Lane 4 · q + r: the sum of quarter q of parts[r], for R of them.
template <int R>
ALWAYS_INLINE vec quarter_sums(const vec* parts) {
  __m512 p[4];
  for (int r = 0; r < 4; r++) p[r] = r < R ? (__m512)parts[r] : _mm512_setzero_ps();
  const __m512d left = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
  const __m512d right = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
  return (vec)_mm512_add_ps((__m512)_mm512_unpacklo_pd(left, right), (__m512)_mm512_unpackhi_pd(left, right));
}
// Lane 4 · i + r: the sum of the quarters of quarters[i] at r.
ALWAYS_INLINE vec whole_sums(const vec* quarters) {
  const __m512* q = reinterpret_cast<const __m512*>(quarters);
  const __m512 left = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 right = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return (vec)_mm512_add_ps(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
}
inline vec sums(const vec* parts) {
  vec quarters[4];
  for (int i = 0; i < 4; i++) quarters[i] = quarter_sums<4>(parts + 4 * i);
  return whole_sums(quarters);
}
#elif VECTOR_LEVEL == 1
inline vec sums(const vec* parts) {
  const __m256* p = reinterpret_cast<const __m256*>(parts);
  const __m256 left = _mm256_hadd_ps(_mm256_hadd_ps(p[0], p[1]), _mm256_hadd_ps(p[2], p[3]));
  const __m256 right = _mm256_hadd_ps(_mm256_hadd_ps(p[4], p[5]), _mm256_hadd_ps(p[6], p[7]));
  return (vec)_mm256_add_ps(_mm256_permute2f128_ps(left, right, 0x20), _mm256_permute2f128_ps(left, right, 0x31));
}
#else
// Which lanes of two vectors are added at each level of `sums`: of the second one in every lane l
// with l & stride, else of the first.
struct Choices {
  int32_t low[4][LANES] = {}, high[4][LANES] = {};
  constexpr Choices() {
    for (int level = 0; 1 << level < LANES; level++)
      for (int l = 0; l < LANES; l++) {
        const int stride = 1 << level;
        low[level][l] = l & stride ? LANES + (l & ~stride) : l;
        high[level][l] = low[level][l] + stride;
      }
  }
};
constexpr Choices CHOICES;

// Lane l: lane choice[l] of a and b behind each other.
inline vec shuffled(vec a, vec b, ints choice) {
#ifdef __clang__
  vec found;
  for (int l = 0; l < LANES; l++) found[l] = choice[l] < LANES ? a[choice[l]] : b[choice[l] - LANES];
  return found;
#else
  return __builtin_shuffle(a, b, choice);
#endif
}

inline vec sums(vec* parts) {
  for (int level = 0, stride = 1; stride < LANES; level++, stride *= 2) {
    ints low, high;
    std::memcpy(&low, CHOICES.low[level], sizeof low);
    std::memcpy(&high, CHOICES.high[level], sizeof high);
    for (int i = 0; i < LANES; i += 2 * stride) {
      const vec a = parts[i], b = parts[i + stride];
      parts[i] = shuffled(a, b, low) + shuffled(a, b, high);
    }
  }
  return parts[0];
}
#endif

// found[RANKS · j + r]: the lanes' sum of totals[j][r]. The order in which lanes are added is the same
// for every j, r, N and R. All NUM_SUMS values of found are written, 0 where there is no j or r.
template <int N, int R, class Y>
ALWAYS_INLINE void lane_sums(const vec (&totals)[N][R], Y* found) {
#if VECTOR_LEVEL >= 2
  static_assert(TOKENS == 4 && RANKS == 4 && LANES == 16, "a quarter of the lanes for each token");
  vec quarters[TOKENS];
  for (int j = 0; j < TOKENS; j++) quarters[j] = j < N ? quarter_sums<R>(totals[j]) : vec{};
  store(found, whole_sums(quarters));
#else
  vec parts[NUM_SUMS] = {};
  for (int j = 0; j < N; j++)
    for (int r = 0; r < R; r++) parts[RANKS * j + r] = totals[j][r];
  for (int i = 0; i < NUM_SUMS; i += LANES) store(found + i, sums(parts + i));
#endif
}

// found, as `lane_sums` writes it: row r · xs[j] for R rows that lie behind each other and N vectors of length n.
// Meanwhile as much is asked for from `ahead` on, unless that is null.
template <int R, int N, class T, class W>
inline void dots(const W* rows, const T* const* xs, int n, float* found, const W* ahead) {
  vec totals[N][R];
  clear(totals);
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec x[N];
    for (int j = 0; j < N; j++) x[j] = load(xs[j] + i);
    for (int r = 0; r < R; r++) {
      if (ahead) __builtin_prefetch(ahead + long(r) * n + i, 0, 2);
      const vec row = load(rows + long(r) * n + i);
      for (int j = 0; j < N; j++) totals[j][r] = fused(totals[j][r], row, x[j]);
    }
  }
  if (i < n)
    for (int r = 0; r < R; r++)
      for (int j = 0; j < N; j++)
        totals[j][r] = fused(totals[j][r], load_part(rows + long(r) * n + i, n - i), load_part(xs[j] + i, n - i));
  lane_sums(totals, found);
}

// Call `run` with as many tokens as a block takes of those that are left, as a constant.
template <class Run>
inline void by_tokens(int left, Run run) {
  if (left >= TOKENS) run(std::integral_constant<int, TOKENS>());
  else if (left == 3) run(std::integral_constant<int, 3>());
  else if (left == 2) run(std::integral_constant<int, 2>());
  else run(std::integral_constant<int, 1>());
}
