#ifdef __x86_64__
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#include <immintrin.h>

#include "../order.h"
#include "tile.h"

namespace jackpot {
namespace {
struct Vec {
  __m256 a, b;
  static Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
};
template <int kPredicate>
inline uint32_t compare(Vec x, Vec y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, kPredicate)) |
         _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, kPredicate)) << 8;
}
inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline uint32_t operator<=(Vec x, Vec y) { return compare<_CMP_LE_OQ>(x, y); }
inline uint32_t operator>=(Vec x, Vec y) { return compare<_CMP_GE_OQ>(x, y); }
inline uint32_t operator<(Vec x, Vec y) { return compare<_CMP_LT_OQ>(x, y); }
inline uint32_t operator>(Vec x, Vec y) { return y < x; }

// In how many lanes comparisons held.
struct Tally {
  __m256i lanes;
  static Tally zero() { return {_mm256_setzero_si256()}; }
  void add_less(Vec x, Vec y) {
    lanes = _mm256_sub_epi32(lanes, _mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)));
    lanes = _mm256_sub_epi32(lanes, _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)));
  }
  int64_t total() const {
    int32_t counts[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), lanes);
    int64_t sum = 0;
    for (const int32_t count : counts) sum += count;
    return sum;
  }
};

inline uint32_t word_of(const uint8_t* bools) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools));
  return ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
}
inline void put_word(uint32_t word, uint8_t* bools) {
  // Byte i gets the byte of the word that holds its bit, and keeps the bit.
  const __m256i from = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(word)), from);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bools), _mm256_and_si256(set, _mm256_set1_epi8(1)));
}
}  // namespace
}  // namespace jackpot

#include "tile_kernels.h"

namespace jackpot {
const TileKernels kAvx2Kernels = {"avx2", all_finite, count_from, collect, run, pack, unpack};
}
#endif
