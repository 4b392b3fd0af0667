// SGD on the scores of every layer in one pass, which also emits the candidates of the swap that follows.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "workspace.h"

namespace jackpot {

struct LayerUpdate {
  float* momenta;
  const float* grads;  // null: no gradient came
  const float* hyper;  // lr, momentum, weight_decay, nesterov, inv_scale
};

std::vector<LayerUpdate> make_updates(const Segments& segments, const Tensors& momenta, const Tensors& grads,
                                      const Tensor& hyper);

// Whether a GradScaler found an infinity; false without one.
bool is_set(const std::optional<Tensor>& found_inf);

// `skip`, or a gradient that is not finite, makes the step one that changes nothing but its count.
void update_scores(const Segments& segments, const std::vector<LayerUpdate>& updates, bool skip,
                   int64_t* control, const std::optional<Workspace>& workspace);

}  // namespace jackpot
