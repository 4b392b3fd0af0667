#include "../order.h"
#include "tile.h"

namespace jackpot {
namespace {
struct Vec {
  float v[16];
  static Vec splat(float x) {
    Vec r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  static Vec load(const float* p) {
    Vec r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
};
inline Vec operator*(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
inline uint32_t operator<=(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] <= b.v[i]) << i;
  return bits;
}
inline uint32_t operator>=(Vec a, Vec b) { return b <= a; }
inline uint32_t operator<(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
inline uint32_t operator>(Vec a, Vec b) { return b < a; }
}  // namespace
}  // namespace jackpot

#include "tile_kernels.h"

namespace jackpot {
const TileKernels kScalarKernels = {"scalar", all_finite, run};
}
