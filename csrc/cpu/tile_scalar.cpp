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

// In how many lanes comparisons held.
struct Tally {
  int64_t lanes;
  static Tally zero() { return {0}; }
  void add_less(Vec x, Vec y) {
    for (int i = 0; i < 16; ++i) lanes += x.v[i] < y.v[i];
  }
  int64_t total() const { return lanes; }
};

constexpr uint64_t kEachByte = 0x0101010101010101;

// Eight bools as bits: a multiplication brings the lowest bit of byte i to bit 56 + i.
inline uint32_t bits_of(const uint8_t* bools) {
  uint64_t bytes;
  memcpy(&bytes, bools, sizeof bytes);
  // Any other value than 0 is true.
  bytes = ((bytes | ((bytes & 0x7f * kEachByte) + 0x7f * kEachByte)) >> 7) & kEachByte;
  return static_cast<uint32_t>(bytes * 0x0102040810204080 >> 56);
}

// Eight bits as bools: byte i keeps bit i of its copy, and adding 0x7f carries it into the highest.
inline void put_bools(uint64_t bits, uint8_t* bools) {
  const uint64_t bytes = (((bits * kEachByte & 0x8040201008040201) + 0x7f * kEachByte) >> 7) & kEachByte;
  memcpy(bools, &bytes, sizeof bytes);
}

inline uint32_t word_of(const uint8_t* bools) {
  return bits_of(bools) | bits_of(bools + 8) << 8 | bits_of(bools + 16) << 16 | bits_of(bools + 24) << 24;
}
inline void put_word(uint32_t word, uint8_t* bools) {
  for (int i = 0; i < 32; i += 8) put_bools(word >> i & 0xff, bools + i);
}
}  // namespace
}  // namespace jackpot

#include "tile_kernels.h"

namespace jackpot {
const TileKernels kScalarKernels = {"scalar", all_finite, count_from, collect, run, pack, unpack};
}
