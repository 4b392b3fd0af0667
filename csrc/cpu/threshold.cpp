// The k-th ranked value of each segment and its position.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "../order.h"
#include "rank_select.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> threshold(const Tensors& values, const Tensor& num_kept, bool joint) {
  const Segments segments = make_segments(values, {}, joint);
  require_cpu(num_kept, ScalarType::Long, "num_kept");
  STD_TORCH_CHECK(num_kept.dim() == 1 && num_kept.numel() == segments.size(),
                  "num_kept must have one entry a segment");
  const int64_t* const kept = static_cast<const int64_t*>(num_kept.data_ptr());
  const std::vector<int64_t> ks(kept, kept + segments.size());
  std::vector<int64_t> which(segments.size());
  std::iota(which.begin(), which.end(), 0);
  for (const int64_t s : which) {
    STD_TORCH_CHECK(ks[s] >= 1 && ks[s] <= segments.numel[s], "num_kept must be in [1, ", segments.numel[s],
                    "], got ", ks[s]);
  }
  std::vector<uint64_t> ranks;
  rank_select(segments, which, ks, ranks);
  Tensor value = empty({segments.size()}, ScalarType::Float);
  Tensor index = empty({segments.size()}, ScalarType::Long);
  float* const values_out = static_cast<float*>(value.data_ptr());
  int64_t* const indices_out = static_cast<int64_t*>(index.data_ptr());
  for (const int64_t s : which) {
    const uint32_t position = position_of(ranks[s]);
    values_out[s] = value_at(segments, s, position);
    indices_out[s] = position;
  }
  return {value, index};
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) { m.impl("threshold", TORCH_BOX(&jackpot::threshold)); }
