#include <torch/csrc/stable/library.h>

#include "step.h"

namespace jackpot {
namespace {

std::vector<UpdateLayer> make_layers(const Device& device, const Tensors& scores, const Tensors& momenta,
                                     const Tensors& grads, const Tensors& masks) {
  STD_TORCH_CHECK(momenta.size() == scores.size() && grads.size() == scores.size(),
                  "momenta and grads must have one entry a layer");
  STD_TORCH_CHECK(masks.size() == scores.size(), "masks must have one entry a layer");
  std::vector<UpdateLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t numel = scores[i].numel();
    UpdateLayer layer = {};
    layer.scores = device.require<float>(scores[i], ScalarType::Float, "scores");
    layer.momenta = device.require<float>(momenta[i], ScalarType::Float, "momenta");
    layer.mask = mask_of(device, masks[i], scores[i]);
    layer.place = place_of(scores[i]);
    STD_TORCH_CHECK(momenta[i].numel() == numel, "momenta must have the scores' shapes");
    STD_TORCH_CHECK(grads[i].numel() == numel || grads[i].numel() == 0,
                    "grads must have the scores' shapes or be empty");
    if (grads[i].numel()) layer.grads = device.require<float>(grads[i], ScalarType::Float, "grads");
    layers.push_back(layer);
  }
  return layers;
}

}  // namespace

ScoreUpdate::ScoreUpdate(const Device& device, const std::vector<int64_t>& sizes, const Tensors& scores,
                         const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                         const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                         const std::optional<Tensor>& workspace, bool joint)
    : launch_(device.launch()),
      layers_(make_layers(device, scores, momenta, grads, masks)),
      memory_(workspace ? *workspace : new_workspace(control, {})),
      workspace_(workspace_in(device, memory_, workspace ? sizes : std::vector<int64_t>())) {
  STD_TORCH_CHECK(hyper.numel() == static_cast<int64_t>(5 * layers_.size()), "hyper must be [layers, 5]");
  table_.joint = joint;
  table_.hyper = device.require<float>(hyper, ScalarType::Float, "hyper");
  table_.control = device.control_of(control);
  if (found_inf) {
    STD_TORCH_CHECK(found_inf->numel() == 1, "found_inf must have one element, got ", found_inf->numel());
    table_.found_inf = device.require<float>(*found_inf, ScalarType::Float, "found_inf");
  }
}

namespace {

void score_update_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                   const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                   const std::optional<Tensor>& workspace, bool joint) {
  const std::vector<int64_t> sizes = segment_sizes(scores, joint);
  const Device device(scores[0]);
  ScoreUpdate(device, sizes, scores, momenta, grads, masks, hyper, control, found_inf, workspace, joint)
      .launch();
}

int64_t workspace_size(const Tensors& scores, bool joint) {
  const int64_t size = Workspace(nullptr, segment_sizes(scores, joint)).size();
  STD_TORCH_CHECK(size < 1ll << 32, "scores must have less than 2^36 weights");
  return size;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) {
  m.impl("score_update_", TORCH_BOX(&jackpot::score_update_));
  m.impl("workspace_size", TORCH_BOX(&jackpot::workspace_size));
}
