#include "../search_step.h"

#include <torch/csrc/stable/library.h>

#include "step.h"

namespace jackpot {

void search_step(const Search& search, const Tensors& grads, const std::optional<Tensor>& found_inf) {
  const std::vector<int64_t> sizes = segment_sizes(search.scores, search.joint);
  const Device device(search.scores[0]);
  const ScoreUpdate update(device, sizes, search.scores, search.momenta, grads, search.masks, search.hyper,
                           search.control, found_inf, search.workspace, search.joint);
  const Swap swap(device, sizes, search.stats, search.scores, search.masks, search.weights, search.effective,
                  search.num_kept, search.schedule, search.control, search.joint, search.pairs, search.seed,
                  search.workspace);
  update.launch();
  swap.launch();
}

}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) {
  m.impl("search_begin", TORCH_BOX(&jackpot::search_begin));
  m.impl("search_step_", TORCH_BOX(&jackpot::search_step_));
  m.impl("search_end", TORCH_BOX(&jackpot::search_end));
}
