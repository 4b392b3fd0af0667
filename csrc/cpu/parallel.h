// Work shared out to torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "floats.h"

namespace jackpot {

// Items of unequal size, one at a time: a thread that got a large one takes fewer.
template <class Body>
void parallel_each(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const WithSubnormals floats;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// Items of one size, a contiguous run for each thread: threads that took turns at neighbouring items read
// memory at half the speed.
template <class Body>
void parallel_runs(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace jackpot
