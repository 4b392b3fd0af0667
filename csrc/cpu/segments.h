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

#include "floats.h"
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

// torch::stable::new_empty looks its operator up by name, which took 0.01 to 0.03 ms from cold caches.
inline Tensor empty(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle tensor;
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &tensor) == AOTI_TORCH_SUCCESS,
      "could not make room for a result");
  return Tensor(tensor);
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
  segments.layers.reserve(scores.size());
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

// A layer and a run of its elements.
struct TileRef {
  int64_t layer, begin, count;
};

// The tiles of some layers, numbered through.
class Tiles {
 public:
  explicit Tiles(const Segments& segments) {
    for (int64_t segment = 0; segment < segments.size(); ++segment) append(segments, segment);
  }
  Tiles(const Segments& segments, const std::vector<int64_t>& which) {
    for (const int64_t segment : which) append(segments, segment);
  }

  int64_t size() const { return size_; }

  template <class Body>
  void each(int64_t begin, int64_t end, const Body& body) const {
    auto span = std::upper_bound(spans_.begin(), spans_.end(), begin,
                                 [](int64_t tile, const Span& s) { return tile < s.end; });
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile >= span->end) ++span;
      const int64_t element = (tile - span->begin) * kTile;
      body({span->layer, element, std::min(span->numel - element, kTile)});
    }
  }

 private:
  struct Span {
    int64_t layer, numel;
    int64_t begin, end;  // of its tiles
  };

  void append(const Segments& segments, int64_t segment) {
    for (int64_t layer = segments.first[segment]; layer < segments.end(segment); ++layer) {
      const int64_t numel = segments.layers[layer].numel, begin = size_;
      size_ += (numel + kTile - 1) / kTile;
      spans_.push_back({layer, numel, begin, size_});
    }
  }

  std::vector<Span> spans_;
  int64_t size_ = 0;
};

// A contiguous run of tiles for each thread.
template <class Body>
void parallel_tiles(const Tiles& tiles, const Body& body) {
  torch::stable::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
    const WithSubnormals floats;
    tiles.each(begin, end, body);
  });
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
