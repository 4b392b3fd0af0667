#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#include <immintrin.h>

#include "../order.h"
#include "tile.h"

namespace jackpot {
namespace {
struct Vec {
  __m512 v;
  static Vec splat(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline uint32_t operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline uint32_t operator>=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline uint32_t operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline uint32_t operator>(Vec a, Vec b) { return b < a; }

// In how many lanes comparisons held.
struct Tally {
  __m512i lanes;
  static Tally zero() { return {_mm512_setzero_si512()}; }
  void add_less(Vec x, Vec y) {
    const __m512i all = _mm512_set1_epi32(-1);
    lanes = _mm512_mask_sub_epi32(lanes, _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), lanes, all);
  }
  int64_t total() const {
    int32_t counts[16];
    _mm512_storeu_si512(counts, lanes);
    int64_t sum = 0;
    for (const int32_t count : counts) sum += count;
    return sum;
  }
};

inline uint32_t word_of(const uint8_t* bools) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools));
  return _mm256_test_epi8_mask(bytes, bytes);
}
inline void put_word(uint32_t word, uint8_t* bools) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bools), _mm256_maskz_set1_epi8(word, 1));
}
}  // namespace
}  // namespace jackpot

#include "tile_kernels.h"

namespace jackpot {
const TileKernels kAvx512Kernels = {"avx512", all_finite, count_from, collect, run, pack, unpack};
}
#endif
