// The k-th ranked value of each segment and its position.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../order.h"
#include "rank_select.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> threshold(const Tensors& values, const Tensor& num_kept, bool joint) {
  const Segments segments = make_segments(values, {}, joint);
  require_cpu(num_kept, ScalarType::Long, "num_kept");
  STD_TORCH_CHECK(num_kept.numel() == segments.size(), "num_kept must have one entry a segment");
  std::vector<int64_t> which, ks;
  for (int64_t s = 0; s < segments.size(); ++s) {
    which.push_back(s);
    ks.push_back(static_cast<const int64_t*>(num_kept.data_ptr())[s]);
    STD_TORCH_CHECK(ks[s] >= 1 && ks[s] <= segments.numel[s], "num_kept must be in [1, ", segments.numel[s],
                    "], got ", ks[s]);
  }
  std::vector<uint64_t> ranks;
  rank_select(segments, which, ks, ranks);
  Tensor value = torch::stable::new_empty(num_kept, {segments.size()}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(num_kept, {segments.size()}, ScalarType::Long);
  for (int64_t s = 0; s < segments.size(); ++s) {
    const uint32_t position = position_of(ranks[s]);
    static_cast<float*>(value.data_ptr())[s] = value_at(segments, s, position);
    static_cast<int64_t*>(index.data_ptr())[s] = position;
  }
  return {value, index};
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) { m.impl("threshold", TORCH_BOX(&jackpot::threshold)); }
