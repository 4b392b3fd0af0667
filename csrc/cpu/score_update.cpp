// SGD on the scores of every layer in one pass, which also emits the candidates of the swap that follows.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "../search_step.h"
#include "parallel.h"
#include "workspace.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

struct LayerUpdate {
  float* momenta;
  const float* grads;  // null: no gradient came
  const float* hyper;  // lr, momentum, weight_decay, nesterov, inv_scale
};

std::vector<LayerUpdate> make_updates(const Segments& segments, const Tensors& momenta, const Tensors& grads,
                                      const Tensor& hyper) {
  const size_t layers = segments.layers.size();
  STD_TORCH_CHECK(momenta.size() == layers && grads.size() == layers,
                  "momenta and grads must have one entry a layer");
  require_cpu(hyper, ScalarType::Float, "hyper");
  STD_TORCH_CHECK(hyper.numel() == static_cast<int64_t>(5 * layers), "hyper must be [layers, 5]");
  std::vector<LayerUpdate> updates;
  for (size_t i = 0; i < layers; ++i) {
    require_cpu(momenta[i], ScalarType::Float, "momenta");
    require_cpu(grads[i], ScalarType::Float, "grads");
    STD_TORCH_CHECK(momenta[i].numel() == segments.layers[i].numel, "momenta must have the scores' shapes");
    STD_TORCH_CHECK(grads[i].numel() == segments.layers[i].numel || grads[i].numel() == 0,
                    "grads must have the scores' shapes or be empty");
    const float* grad = grads[i].numel() ? static_cast<const float*>(grads[i].data_ptr()) : nullptr;
    updates.push_back({static_cast<float*>(momenta[i].data_ptr()), grad,
                       static_cast<const float*>(hyper.data_ptr()) + 5 * i});
  }
  return updates;
}

bool all_finite(const std::vector<TileRef>& tiles, const std::vector<LayerUpdate>& updates) {
  std::atomic<bool> finite{true};
  parallel_runs(static_cast<int64_t>(tiles.size()), [&](int64_t t) {
    const float* grads = updates[tiles[t].layer].grads;
    if (grads && !tile_kernels().all_finite(grads + tiles[t].begin, tiles[t].count)) finite = false;
  });
  return finite;
}

bool is_set(const std::optional<Tensor>& found_inf) {
  if (!found_inf) return false;
  require_cpu(*found_inf, ScalarType::Float, "found_inf");
  STD_TORCH_CHECK(found_inf->numel() == 1, "found_inf must have one element, got ", found_inf->numel());
  return *static_cast<const float*>(found_inf->data_ptr()) != 0;
}

void update_tile(const Segments& segments, const TileRef& ref, const LayerUpdate& update,
                 const Workspace* workspace) {
  uint64_t kept[kTileRanks], pruned[kTileRanks];
  Tile tile = make_tile(segments, ref);
  if (update.grads) {
    tile.momenta = update.momenta + ref.begin;
    tile.grads = update.grads + ref.begin;
    tile.lr = update.hyper[0];
    tile.momentum = update.hyper[1];
    tile.weight_decay = update.hyper[2];
    tile.nesterov = update.hyper[3] != 0;
    tile.inv_scale = update.hyper[4];
  }
  const int64_t segment = segments.layers[ref.layer].segment;
  if (!workspace || !workspace->records[segment]->armed) {
    if (update.grads) tile_kernels().run(tile);
    return;
  }
  tile.window = workspace->records[segment]->window;
  tile.kept = kept;
  tile.pruned = pruned;
  workspace->candidates[segment].append(tile, tile_kernels().run(tile));
}

}  // namespace

void score_update_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                   const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                   const std::optional<Tensor>& workspace, bool joint) {
  const Segments segments = make_segments(scores, masks, joint);
  const std::vector<LayerUpdate> updates = make_updates(segments, momenta, grads, hyper);
  int64_t* const steps = control_of(control);
  std::optional<Workspace> lists;
  if (workspace) lists.emplace(segments, *workspace);
  std::vector<TileRef> tiles;
  for (size_t layer = 0; layer < segments.layers.size(); ++layer) append_tiles(segments, layer, tiles);

  steps[2] = is_set(found_inf) || !all_finite(tiles, updates);
  steps[1] += steps[2];
  if (steps[2]) return;
  steps[0] += 1;
  if (lists) {
    for (SegmentRecord* record : lists->records) {
      record->counts = {};
      record->emitted_at = record->armed ? steps[0] : 0;
    }
  }
  parallel_runs(static_cast<int64_t>(tiles.size()), [&](int64_t t) {
    update_tile(segments, tiles[t], updates[tiles[t].layer], lists ? &*lists : nullptr);
  });
}

namespace {

int64_t workspace_size(const Tensors& scores, bool joint) {
  return workspace_words(make_segments(scores, {}, joint).numel);
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("score_update_", TORCH_BOX(&jackpot::score_update_));
  m.impl("workspace_size", TORCH_BOX(&jackpot::workspace_size));
}
