// The whole search step in one call: unpacking 64 tensors twice, and the dispatcher, cost more than a small
// network's swaps.
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace jackpot {
namespace {

Tensor search_step_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                    const Tensors& weights, const Tensors& effective, const Tensor& hyper,
                    const Tensor& num_kept, const Tensor& schedule, const Tensor& control,
                    const std::optional<Tensor>& found_inf, bool joint, const std::string& pairs,
                    int64_t seed, const std::optional<Tensor>& workspace) {
  score_update_(scores, momenta, grads, masks, hyper, control, found_inf, workspace, joint);
  return swap_(scores, masks, weights, effective, num_kept, schedule, control, joint, pairs, seed, workspace);
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) { m.impl("search_step_", TORCH_BOX(&jackpot::search_step_)); }
