// The whole search step in one call: scores and masks are unpacked once, and the dispatcher is passed once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace jackpot {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What it is made of, on the device of the library.
void score_update_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                   const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                   const std::optional<Tensor>& workspace, bool joint);

Tensor swap_(const Tensors& scores, const Tensors& masks, const Tensors& weights, const Tensors& effective,
             const Tensor& num_kept, const Tensor& schedule, const Tensor& control, bool joint,
             const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace);

inline Tensor search_step_(const Tensors& scores, const Tensors& momenta, const Tensors& grads,
                           const Tensors& masks, const Tensors& weights, const Tensors& effective,
                           const Tensor& hyper, const Tensor& num_kept, const Tensor& schedule,
                           const Tensor& control, const std::optional<Tensor>& found_inf, bool joint,
                           const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace) {
  score_update_(scores, momenta, grads, masks, hyper, control, found_inf, workspace, joint);
  return swap_(scores, masks, weights, effective, num_kept, schedule, control, joint, pairs, seed, workspace);
}

}  // namespace jackpot
