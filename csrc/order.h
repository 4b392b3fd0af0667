// The one total order of the package: a ranks above b when its score is larger, or the scores are equal and
// its position is lower. -0 equals +0, NaN ranks greatest. A candidate is one 64-bit rank; a larger rank
// ranks above. The functions are static: each instruction set and each device keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define JACKPOT_HOST_DEVICE __host__ __device__
#else
#define JACKPOT_HOST_DEVICE
#endif

namespace jackpot {

JACKPOT_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

JACKPOT_HOST_DEVICE static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

JACKPOT_HOST_DEVICE static inline uint32_t rank_key(float score) {
  const uint32_t bits = float_bits(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;  // NaN
  if (bits == 0x80000000u) return 0x80000000u;                 // -0 has the key of +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

JACKPOT_HOST_DEVICE static inline uint64_t rank_of(float score, uint32_t position) {
  return static_cast<uint64_t>(rank_key(score)) << 32 | static_cast<uint32_t>(~position);
}

JACKPOT_HOST_DEVICE static inline uint32_t key_of(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }

JACKPOT_HOST_DEVICE static inline uint32_t position_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

JACKPOT_HOST_DEVICE static inline float score_of(uint64_t rank) {
  const uint32_t key = key_of(rank);
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Which of the weights that cross the threshold swap.
enum class Pairs : uint8_t { kBest, kInverse, kRandom };

// Random pairs swap in the order of this hash of (seed, step, position); distinct positions have distinct
// hashes.
JACKPOT_HOST_DEVICE static inline uint64_t pair_hash(uint64_t seed, uint64_t step, uint32_t position) {
  uint64_t h = position + seed * 0x2545F4914F6CDD1Dull + step * 0x9E3779B97F4A7C15ull;
  h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9ull;
  h = (h ^ h >> 27) * 0x94D049BB133111EBull;
  return h ^ h >> 31;
}

}  // namespace jackpot
