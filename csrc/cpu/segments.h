// Layers, the segments they form (one each, or one for all), and the tiles that threads work through.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "tile.h"

namespace jackpot {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Layer {
  float* scores;
  const uint32_t* mask;  // null: nothing is kept
  int64_t numel;
  int64_t segment;
  int64_t position;  // of its first element, in the segment
};

struct Segments {
  std::vector<Layer> layers;
  std::vector<int64_t> numel;  // [S]
  std::vector<int64_t> first;  // [S], the segment's first layer

  int64_t size() const { return static_cast<int64_t>(numel.size()); }
  int64_t end(int64_t segment) const {
    return segment + 1 < size() ? first[segment + 1] : static_cast<int64_t>(layers.size());
  }
};

inline void require_cpu(const Tensor& tensor, torch::headeronly::ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype, name,
                  " must be a contiguous CPU tensor of the expected dtype");
}

// Steps taken, steps skipped, and 1 if this step was skipped.
inline int64_t* control_of(const Tensor& control) {
  require_cpu(control, torch::headeronly::ScalarType::Long, "control");
  STD_TORCH_CHECK(control.numel() == 3, "control must have 3 elements, got ", control.numel());
  return static_cast<int64_t*>(control.data_ptr());
}

// Masks may be an empty list. Positions are 32 bits wide, which bounds a segment.
inline Segments make_segments(const Tensors& scores, const Tensors& masks, bool joint) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!scores.empty(), "scores must name at least one layer, got none");
  STD_TORCH_CHECK(masks.empty() || masks.size() == scores.size(), "masks must have one entry a layer");
  Segments segments;
  for (size_t i = 0; i < scores.size(); ++i) {
    require_cpu(scores[i], ScalarType::Float, "scores");
    if (i == 0 || !joint) {
      segments.numel.push_back(0);
      segments.first.push_back(static_cast<int64_t>(i));
    }
    const int64_t numel = scores[i].numel(), segment = segments.size() - 1;
    const uint32_t* mask = nullptr;
    if (!masks.empty()) {
      require_cpu(masks[i], ScalarType::Int, "masks");
      STD_TORCH_CHECK(masks[i].numel() == (numel + 31) / 32, "masks must have one int32 word for 32 weights");
      mask = static_cast<const uint32_t*>(masks[i].data_ptr());
    }
    segments.layers.push_back(
        {static_cast<float*>(scores[i].data_ptr()), mask, numel, segment, segments.numel[segment]});
    segments.numel[segment] += numel;
    STD_TORCH_CHECK(segments.numel[segment] <= 0xffffffffll,
                    "a segment must have less than 2^32 weights, got ", segments.numel[segment]);
  }
  return segments;
}

// The layer that holds a position of a segment.
inline const Layer& layer_at(const Segments& segments, int64_t segment, int64_t position) {
  const auto begin = segments.layers.begin() + segments.first[segment];
  const auto end = segments.layers.begin() + segments.end(segment);
  if (end - begin == 1) return *begin;
  return *(std::upper_bound(begin, end, position, [](int64_t p, const Layer& l) { return p < l.position; }) -
           1);
}

inline float value_at(const Segments& segments, int64_t segment, int64_t position) {
  const Layer& layer = layer_at(segments, segment, position);
  return layer.scores[position - layer.position];
}

// The tiles of some layers, in one list: layer and first element.
struct TileRef {
  int64_t layer, begin, count;
};

inline void append_tiles(const Segments& segments, int64_t layer, std::vector<TileRef>& tiles) {
  const int64_t numel = segments.layers[layer].numel;
  for (int64_t begin = 0; begin < numel; begin += kTile) {
    tiles.push_back({layer, begin, numel - begin < kTile ? numel - begin : kTile});
  }
}

inline Tile make_tile(const Segments& segments, const TileRef& ref) {
  const Layer& layer = segments.layers[ref.layer];
  Tile tile = {};
  tile.scores = layer.scores + ref.begin;
  tile.mask = layer.mask ? layer.mask + ref.begin / 32 : nullptr;
  tile.count = ref.count;
  tile.position = static_cast<uint32_t>(layer.position + ref.begin);
  return tile;
}

}  // namespace jackpot
