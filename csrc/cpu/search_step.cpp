#include "../search_step.h"

#include <torch/csrc/stable/library.h>

#include "score_update.h"
#include "swap.h"

namespace jackpot {

void search_step(const Search& search, const Tensors& grads, const std::optional<Tensor>& found_inf) {
  const Segments segments = make_segments(search.scores, search.masks, search.joint);
  const std::vector<LayerUpdate> updates = make_updates(segments, search.momenta, grads, search.hyper);
  const SwapSettings settings =
      make_swap_settings(segments, search.masks, search.weights, search.effective, search.num_kept,
                         search.schedule, search.pairs, search.seed);
  const std::optional<Workspace> workspace = make_workspace(segments, search.workspace);
  int64_t* const control = control_of(search.control);
  int64_t* const stats = stats_of(search.stats, segments);
  const bool skip = is_set(found_inf);
  STD_TORCH_CHECK(control[0] >= 0 && control[0] < settings.total_steps, "control[0] must be in [0, ",
                  settings.total_steps, ") before a step, got ", control[0]);
  update_scores(segments, updates, skip, control, workspace);
  swap(segments, settings, control, workspace, stats);
}

}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("search_begin", TORCH_BOX(&jackpot::search_begin));
  m.impl("search_step_", TORCH_BOX(&jackpot::search_step_));
  m.impl("search_end", TORCH_BOX(&jackpot::search_end));
}
