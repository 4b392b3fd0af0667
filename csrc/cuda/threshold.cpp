#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace jackpot {
namespace {

std::tuple<Tensor, Tensor> thresholds(const Tensors& values, const Tensor& num_kept, bool joint) {
  const std::vector<int64_t> sizes = segment_sizes(values, joint);
  const Device device(values[0]);
  const int64_t segments = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(num_kept.numel() == segments, "num_kept must have one entry a segment");
  std::vector<ThresholdLayer> layers;
  for (const Tensor& value : values) {
    layers.push_back({device.require<float>(value, ScalarType::Float, "values"), place_of(value)});
  }
  Tensor value = torch::stable::new_empty(num_kept, {segments}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(num_kept, {segments}, ScalarType::Long);
  const Tensor memory = new_workspace(num_kept, sizes);
  ThresholdTable table = {};
  table.joint = joint;
  table.num_kept = device.require<int64_t>(num_kept, ScalarType::Long, "num_kept");
  table.value = static_cast<float*>(value.data_ptr());
  table.index = static_cast<int64_t*>(index.data_ptr());
  check(threshold(device.launch(), layers, table, workspace_in(device, memory, sizes)));
  return {value, index};
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) { m.impl("threshold", TORCH_BOX(&jackpot::thresholds)); }
