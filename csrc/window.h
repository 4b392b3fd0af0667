// Which scores an update emits as candidates of the swap that follows, and how many of them a list holds.
#pragma once

#include "order.h"

namespace jackpot {

// Emitted are all scores in [low, high], the kept ones up to kept_high and the pruned ones from pruned_low.
struct Window {
  float low, high;
  float kept_high, pruned_low;  // at most high, at least low
};

// No kept score up to this one is missing.
JACKPOT_HOST_DEVICE static inline float lowest_until(const Window& window) {
  return window.kept_high >= window.low ? window.high : window.kept_high;
}

// No pruned score from this one on is missing.
JACKPOT_HOST_DEVICE static inline float highest_from(const Window& window) {
  return window.pruned_low <= window.high ? window.low : window.pruned_low;
}

// The share of a layer that a step proposes to swap is a per cent or so. Two lists of 1/32 are 0.5 bytes a
// weight.
template <class Int>
JACKPOT_HOST_DEVICE static constexpr Int candidate_capacity(Int numel) {
  return numel / 32 + 512;
}

}  // namespace jackpot
