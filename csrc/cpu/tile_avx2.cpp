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
}  // namespace
}  // namespace jackpot

#include "tile_kernels.h"

namespace jackpot {
const TileKernels kAvx2Kernels = {"avx2", all_finite, run};
}
#endif
