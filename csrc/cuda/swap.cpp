#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "step.h"

namespace jackpot {
namespace {

Pairs pairs_named(const std::string& name) {
  if (name == "best") return Pairs::kBest;
  if (name == "inverse") return Pairs::kInverse;
  STD_TORCH_CHECK(name == "random", "pairs must be best, inverse or random, got ", name);
  return Pairs::kRandom;
}

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

}  // namespace

void swap_into(const Tensor& stats, const Tensors& scores, const Tensors& masks, const Tensors& weights,
               const Tensors& effective, const Tensor& num_kept, const Tensor& schedule,
               const Tensor& control, bool joint, const std::string& pairs, int64_t seed,
               const std::optional<Tensor>& workspace) {
  const std::vector<int64_t> sizes = segment_sizes(scores, joint);
  const Device device(scores[0]);
  const int64_t segments = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(masks.size() == scores.size(), "masks must have one entry a layer");
  STD_TORCH_CHECK(weights.size() == effective.size() && (weights.empty() || weights.size() == masks.size()),
                  "weights and effective must both be empty or have one entry a layer");
  STD_TORCH_CHECK(num_kept.numel() == 2 * segments, "num_kept must be [segments, 2]");
  STD_TORCH_CHECK(schedule.dim() == 2 && schedule.size(1) == 2, "schedule must be [steps, 2]");
  std::vector<SwapLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i) {
    const bool patched = !weights.empty();
    layers.push_back(make_layer(device, scores[i], masks[i], patched ? &weights[i] : nullptr,
                                patched ? &effective[i] : nullptr));
  }
  const Tensor memory = workspace ? *workspace : new_workspace(control, sizes);
  STD_TORCH_CHECK(stats.numel() == 5 * segments, "stats must be [segments, 5]");
  SwapTable table = {};
  table.joint = joint;
  table.pairs = pairs_named(pairs);
  table.seed = seed;
  table.num_kept = device.require<int64_t>(num_kept, ScalarType::Long, "num_kept");
  table.schedule = device.require<double>(schedule, ScalarType::Double, "schedule");
  table.steps = schedule.size(0);
  table.control = device.control_of(control);
  table.stats = device.require<int64_t>(stats, ScalarType::Long, "stats");
  check(swap(device.launch(), layers, table, workspace_in(device, memory, sizes)));
}

namespace {

Tensor swap_(const Tensors& scores, const Tensors& masks, const Tensors& weights, const Tensors& effective,
             const Tensor& num_kept, const Tensor& schedule, const Tensor& control, bool joint,
             const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace) {
  const int64_t segments = static_cast<int64_t>(segment_sizes(scores, joint).size());
  const Tensor stats = torch::stable::new_empty(control, {segments, 5});
  swap_into(stats, scores, masks, weights, effective, num_kept, schedule, control, joint, pairs, seed,
            workspace);
  return stats;
}

}  // namespace

}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) { m.impl("swap_", TORCH_BOX(&jackpot::swap_)); }
