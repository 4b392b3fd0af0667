#include "score_update.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "parallel.h"

namespace jackpot {

using torch::headeronly::ScalarType;

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

bool is_set(const std::optional<Tensor>& found_inf) {
  if (!found_inf) return false;
  require_cpu(*found_inf, ScalarType::Float, "found_inf");
  STD_TORCH_CHECK(found_inf->numel() == 1, "found_inf must have one element, got ", found_inf->numel());
  return *static_cast<const float*>(found_inf->data_ptr()) != 0;
}

namespace {

// Tiles that one thread checks in turn, of 4 MiB of gradients.
constexpr int64_t kCheckedTiles = 256;

// Each thread goes from its last tiles to its first, so that the update, which goes the other way, starts
// with gradients that are still in cache.
bool all_finite(const Tiles& tiles, const std::vector<LayerUpdate>& updates) {
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t until = end; until > begin; until -= kCheckedTiles) {
      tiles.each(std::max(begin, until - kCheckedTiles), until, [&](const TileRef& tile) {
        const float* grads = updates[tile.layer].grads;
        if (grads && !tile_kernels().all_finite(grads + tile.begin, tile.count)) finite = false;
      });
    }
  });
  return finite;
}

void update_tile(const Segments& segments, const TileRef& ref, const LayerUpdate& update,
                 const std::optional<Workspace>& workspace) {
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

void update_scores(const Segments& segments, const std::vector<LayerUpdate>& updates, bool skip,
                   int64_t* control, const std::optional<Workspace>& workspace) {
  const Tiles tiles(segments);
  control[2] = skip || !all_finite(tiles, updates);
  control[1] += control[2];
  if (control[2]) return;
  control[0] += 1;
  if (workspace) {
    for (SegmentRecord* record : workspace->records) {
      record->counts = {};
      record->emitted_at = control[0];
    }
  }
  parallel_tiles(tiles,
                 [&](const TileRef& tile) { update_tile(segments, tile, updates[tile.layer], workspace); });
}

namespace {

void score_update_(const Tensors& scores, const Tensors& momenta, const Tensors& grads, const Tensors& masks,
                   const Tensor& hyper, const Tensor& control, const std::optional<Tensor>& found_inf,
                   const std::optional<Tensor>& workspace, bool joint) {
  const Segments segments = make_segments(scores, masks, joint);
  update_scores(segments, make_updates(segments, momenta, grads, hyper), is_set(found_inf),
                control_of(control), make_workspace(segments, workspace));
}

int64_t workspace_size(const Tensors& scores, bool joint) {
  return workspace_words(make_segments(scores, {}, joint).numel);
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("score_update_", TORCH_BOX(&jackpot::score_update_));
  m.impl("workspace_size", TORCH_BOX(&jackpot::workspace_size));
}
