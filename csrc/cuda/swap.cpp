#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../search_step.h"
#include "step.h"

namespace jackpot {
namespace {

SwapLayer make_layer(const Device& device, const Tensor& scores, const Tensor& mask, const Tensor* weight,
                     const Tensor* effective) {
  SwapLayer layer = {};
  layer.scores = device.require<float>(scores, ScalarType::Float, "scores");
  layer.mask = mask_of(device, mask, scores);
  layer.place = place_of(scores);
  if (!effective || effective->numel() == 0) return layer;
  device.require_here(*weight, "weights");
  device.require_here(*effective, "effective");
  STD_TORCH_CHECK(weight->numel() == scores.numel() && weight->dim() == effective->dim(),
                  "effective must have the weight's shape and device");
  layer.weight = weight->data_ptr();
  layer.effective = effective->data_ptr();
  layer.weight_dtype = dtype_of(*weight, "weight");
  layer.effective_dtype = dtype_of(*effective, "effective");
  const std::vector<Dim> dims = merged_dims(*weight, *effective, "effective");
  STD_TORCH_CHECK(dims.size() <= kMaxDims, "weights must have at most ", kMaxDims, " dimensions");
  std::copy(dims.begin(), dims.end(), layer.dims);
  layer.num_dims = static_cast<uint8_t>(dims.size());
  return layer;
}

std::vector<SwapLayer> make_layers(const Device& device, const Tensors& scores, const Tensors& masks,
                                   const Tensors& weights, const Tensors& effective) {
  STD_TORCH_CHECK(masks.size() == scores.size(), "masks must have one entry a layer");
  STD_TORCH_CHECK(weights.size() == effective.size() && (weights.empty() || weights.size() == masks.size()),
                  "weights and effective must both be empty or have one entry a layer");
  const bool patched = !weights.empty();
  std::vector<SwapLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i) {
    layers.push_back(make_layer(device, scores[i], masks[i], patched ? &weights[i] : nullptr,
                                patched ? &effective[i] : nullptr));
  }
  return layers;
}

}  // namespace

Swap::Swap(const Device& device, const std::vector<int64_t>& sizes, const Tensor& stats,
           const Tensors& scores, const Tensors& masks, const Tensors& weights, const Tensors& effective,
           const Tensor& num_kept, const Tensor& schedule, const Tensor& control, bool joint,
           const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace)
    : launch_(device.launch()),
      layers_(make_layers(device, scores, masks, weights, effective)),
      memory_(workspace ? *workspace : new_workspace(control, sizes)),
      workspace_(workspace_in(device, memory_, sizes)) {
  const int64_t segments = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(num_kept.numel() == 2 * segments, "num_kept must be [segments, 2]");
  STD_TORCH_CHECK(schedule.dim() == 2 && schedule.size(1) == 2, "schedule must be [steps, 2]");
  STD_TORCH_CHECK(stats.numel() == 5 * segments, "stats must be [segments, 5]");
  table_.joint = joint;
  table_.pairs = pairs_named(pairs);
  table_.seed = seed;
  table_.num_kept = device.require<int64_t>(num_kept, ScalarType::Long, "num_kept");
  table_.schedule = device.require<double>(schedule, ScalarType::Double, "schedule");
  table_.steps = schedule.size(0);
  table_.control = device.control_of(control);
  table_.stats = device.require<int64_t>(stats, ScalarType::Long, "stats");
}

namespace {

Tensor swap_(const Tensors& scores, const Tensors& masks, const Tensors& weights, const Tensors& effective,
             const Tensor& num_kept, const Tensor& schedule, const Tensor& control, bool joint,
             const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace) {
  const std::vector<int64_t> sizes = segment_sizes(scores, joint);
  const Device device(scores[0]);
  const Tensor stats = torch::stable::new_empty(control, {static_cast<int64_t>(sizes.size()), 5});
  Swap(device, sizes, stats, scores, masks, weights, effective, num_kept, schedule, control, joint, pairs,
       seed, workspace)
      .launch();
  return stats;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) { m.impl("swap_", TORCH_BOX(&jackpot::swap_)); }
