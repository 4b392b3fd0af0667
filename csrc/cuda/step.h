// The two halves of the search step, from tensors to launches.
#pragma once

#include <optional>
#include <string>

#include "tensors.h"

namespace jackpot {

void score_update_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                   const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                   const std::optional<Tensor>& workspace, bool joint);

// Writes its statistics to `stats`.  // [S, 5]
void swap_into(const Tensor& stats, const Tensors& scores, const Tensors& masks, const Tensors& weights,
               const Tensors& effective, const Tensor& num_kept, const Tensor& schedule,
               const Tensor& control, bool joint, const std::string& pairs, int64_t seed,
               const std::optional<Tensor>& workspace);

}  // namespace jackpot
