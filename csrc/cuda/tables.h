// What the kernels are told, in plain structs that travel by value as kernel parameters: a captured graph
// keeps its own copy, and no table has to be brought to the device first.
#pragma once

#include <cstdint>

#include "workspace.h"

namespace jackpot {

// With kMaxLayers a table stays below the 32,764 bytes that kernel parameters may take.
constexpr uint32_t kMaxDims = 5;
constexpr uint32_t kUpdateTile = 2048;
constexpr uint32_t kScanTile = 16384;

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Where a layer lies in its segment, in the tiles of a launch, and in the candidate lists.
struct Place {
  uint32_t numel;
  uint32_t position;    // of its first element, in the segment
  uint32_t first_tile;  // of all tiles of the launch
  uint32_t lists;       // first rank of its segment's two lists
};

struct UpdateLayer {
  float* scores;
  float* momenta;
  const float* grads;  // null: no gradient came
  const uint32_t* mask;
  Place place;
};

struct UpdateTable {
  UpdateLayer layers[kMaxLayers];
  uint32_t count, tiles;
  bool joint, last;        // of the tables of a step
  const float* hyper;      // [count, 5]: lr, momentum, weight_decay, nesterov, inv_scale
  const float* found_inf;  // null: no GradScaler
  int64_t* control;        // [3]
  Header* header;
  Segment* segments;      // null: no candidates wanted
  Segment* all_segments;  // of the whole step
  uint32_t num_segments;
  uint64_t* ranks;
};

struct Dim {
  uint32_t size;
  int32_t weight_stride, effective_stride;
};

struct SwapLayer {
  const float* scores;
  uint32_t* mask;
  const void* weight;
  void* effective;  // null: only the bits change
  Place place;
  Dim dims[kMaxDims];
  uint8_t num_dims;
  Dtype weight_dtype, effective_dtype;
};

struct SwapTable {
  SwapLayer layers[kMaxLayers];
  uint32_t count, tiles;
  bool joint;
  Pairs pairs;
  int64_t seed;
  const int64_t* num_kept;  // [segments, 2]
  const double* schedule;   // [steps, 2]
  int64_t steps;
  const int64_t* control;  // [3]
  int64_t* stats;          // [segments, 5]
  Header* header;
  Segment* segments;
  uint32_t* histograms;  // [segments, kProblems, kBins]
  uint64_t* ranks;
};
static_assert(sizeof(SwapTable) <= 32764 && sizeof(UpdateTable) <= 32764);

// The product of two tensors of one shape, seen as three dimensions, the innermost first.
struct Product {
  const void *grad, *weight;
  float* out;  // contiguous
  Dtype grad_dtype, weight_dtype;
  uint32_t sizes[3];
  int64_t grad_strides[3], weight_strides[3];
};

struct ThresholdLayer {
  const float* scores;
  Place place;
};

struct ThresholdTable {
  ThresholdLayer layers[kMaxLayers];
  uint32_t count, tiles;
  bool joint;
  const int64_t* num_kept;  // [segments]
  float* value;             // [segments]
  int64_t* index;           // [segments]
  Header* header;
  Segment* segments;
  uint32_t* histograms;
};

// Fills in where the layers lie; their numbers of elements stand in `place` already.
template <class Table>
void place_layers(Table& table, uint32_t tile, uint64_t& first_rank) {
  uint64_t numel = 0;
  table.tiles = 0;
  for (uint32_t i = 0; i < table.count; ++i) {
    Place& place = table.layers[i].place;
    place.position = table.joint ? static_cast<uint32_t>(numel) : 0;
    place.first_tile = table.tiles;
    place.lists = static_cast<uint32_t>(first_rank);
    if (!table.joint) first_rank += 2 * candidate_capacity(place.numel);
    table.tiles += static_cast<uint32_t>((uint64_t{place.numel} + tile - 1) / tile);
    numel += place.numel;
  }
}

}  // namespace jackpot
