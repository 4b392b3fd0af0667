// What a tile of a layer, or a mask, needs from the vector units. The bodies are written once
// (tile_kernels.h) and compiled for each instruction set; all give the same bits.
#pragma once

#include <cstdint>

#include "../window.h"

namespace jackpot {

// A tile's candidates wait in two buffers of this many ranks: 64 KiB, small enough for any stack.
constexpr int64_t kTile = 4096;
// Ranks are written four at a time, the last ones perhaps past the end of a full list.
constexpr int64_t kTileRanks = kTile + 4;

// Eight took twice as long to count with, 13.5 ns instead of 7.0 for 64 values in cache, and left a range not
// much narrower.
constexpr int kPivots = 4;

struct Counts {
  int64_t kept_out, pruned_out;  // candidates emitted
  int64_t above, pruned_above;   // scores above the window, of all and of the pruned
  int64_t kept;                  // mask bits set
};

struct Tile {
  float* scores;         // [count]
  float* momenta;        // [count]
  const float* grads;    // [count], null: the scores stay
  const uint32_t* mask;  // [ceil(count / 32)], null: nothing is kept
  int64_t count;
  uint32_t position;  // of the first element, in its segment
  float lr, momentum, weight_decay, inv_scale;
  bool nesterov;
  Window window;
  uint64_t *kept, *pruned;  // [kTileRanks], null: no candidates wanted
};

struct TileKernels {
  const char* capability;
  bool (*all_finite)(const float* values, int64_t count);
  // How many values rank at or above each of the pivots, which are numbers.
  void (*count_from)(const float* values, int64_t count, const float* pivots, int64_t* counts);
  // Writes the ranks of the values from `low` to `high` to `ranks`, [kTileRanks], returns how many there are,
  // and adds to `above` how many are higher, NaN among them. `position` is that of the first value.
  int64_t (*collect)(const float* values, int64_t count, uint32_t position, float low, float high,
                     uint64_t* ranks, int64_t& above);
  Counts (*run)(const Tile& tile);
  void (*pack)(const uint8_t* bools, int64_t words, uint32_t* out);  // 32 bools a word, any but 0 is true
  void (*unpack)(const uint32_t* in, int64_t words, uint8_t* bools);
};

extern const TileKernels kScalarKernels;
#ifdef __x86_64__
extern const TileKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The widest kernels this machine runs, or those that JACKPOT_CPU (scalar, avx2, avx512) names.
const TileKernels& tile_kernels();

}  // namespace jackpot
