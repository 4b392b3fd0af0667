// Threshold, choice of the swaps and the swaps themselves, for every segment.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../order.h"
#include "patch.h"
#include "workspace.h"

namespace jackpot {

// What a swap is told.
struct SwapSettings {
  std::vector<Patch> patches;  // [layers]
  const int64_t* num_kept;     // [S, 2]
  const double* schedule;      // [T, 2]
  int64_t total_steps;
  Pairs pairs;
  int64_t seed;
};

SwapSettings make_swap_settings(const Segments& segments, const Tensors& masks, const Tensors& weights,
                                const Tensors& effective, const Tensor& num_kept, const Tensor& schedule,
                                const std::string& pairs, int64_t seed);

// Rate and ramp of a step, 1 the first, must be in [0, 1]; a NaN is not.
void require_rates(const SwapSettings& settings, int64_t step);

// What a swap tells: n, entered, left, bits of the threshold, 1 if the scores were scanned again.  // [S, 5]
inline int64_t* stats_of(const Tensor& stats, const Segments& segments) {
  require_cpu(stats, torch::headeronly::ScalarType::Long, "stats");
  STD_TORCH_CHECK(stats.numel() == 5 * segments.size(), "stats must be [segments, 5]");
  return static_cast<int64_t*>(stats.data_ptr());
}

// Takes the swaps of step control[0]; a skipped step swaps nothing, and its statistics are zeros.
void swap(const Segments& segments, const SwapSettings& settings, const int64_t* control,
          const std::optional<Workspace>& workspace, int64_t* stats);

}  // namespace jackpot
