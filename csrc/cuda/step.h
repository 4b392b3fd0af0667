// The two halves of the search step, from tensors to launches. Making a half looks at all of its tensors, and
// launching it at none: a step of which anything does not fit launches nothing.
#pragma once

#include <optional>
#include <string>

#include "tensors.h"

namespace jackpot {

class ScoreUpdate {
 public:
  // `sizes` are the segments'.
  ScoreUpdate(const Device& device, const std::vector<int64_t>& sizes, const Tensors& scores,
              const Tensors& momenta, const Tensors& grads, const Tensors& masks, const Tensor& hyper,
              const Tensor& control, const std::optional<Tensor>& found_inf,
              const std::optional<Tensor>& workspace, bool joint);

  void launch() const { check(score_update(launch_, layers_, table_, workspace_)); }

 private:
  Launch launch_;
  std::vector<UpdateLayer> layers_;
  UpdateTable table_ = {};
  Tensor memory_;
  Workspace workspace_;
};

class Swap {
 public:
  // `sizes` are the segments'; the statistics go to `stats`.  // [S, 5]
  Swap(const Device& device, const std::vector<int64_t>& sizes, const Tensor& stats, const Tensors& scores,
       const Tensors& masks, const Tensors& weights, const Tensors& effective, const Tensor& num_kept,
       const Tensor& schedule, const Tensor& control, bool joint, const std::string& pairs, int64_t seed,
       const std::optional<Tensor>& workspace);

  void launch() const { check(swap(launch_, layers_, table_, workspace_)); }

 private:
  Launch launch_;
  std::vector<SwapLayer> layers_;
  SwapTable table_ = {};
  Tensor memory_;
  Workspace workspace_;
};

}  // namespace jackpot
