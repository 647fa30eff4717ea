// The base's weights as they lie in memory, decoded to bfloat16. Compiled for the instruction sets
// that multiply bfloat16. No include guard on purpose.

constexpr int UNIT = 64;  // inputs that are decoded at a time: one scale of 4-bit codes

struct Halves { __m512i first, second; };  // of a unit of one row

// 4-bit codes as bitsandbytes keeps them: two a byte, high nibble first. A unit's odd inputs are its
// first half and its even inputs the second; the activations are laid likewise.
ALWAYS_INLINE Halves four_bit_halves(__m512 code, const uint8_t* codes, float scale) {
  const __m512 values = _mm512_mul_ps(code, _mm512_set1_ps(scale));
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);  // twice: bit 4 is ignored
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  return {_mm512_permutexvar_epi16(bytes, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table)};
}

inline __m512 floats(const int8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
ALWAYS_INLINE Halves eight_bit_halves(const int8_t* codes, float scale) {
  const __m512 factor = _mm512_set1_ps(scale);
  const auto half = [&](const int8_t* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(floats(from + 16), factor), _mm512_mul_ps(floats(from), factor));
  };
  return {half(codes), half(codes + UNIT / 2)};
}
