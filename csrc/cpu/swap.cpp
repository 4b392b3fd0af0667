#include "swap.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "../search_step.h"
#include "parallel.h"
#include "rank_select.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the schedules and the person ask of a step.
struct Request {
  double rate, ramp;
  int64_t step, seed;
  Pairs pairs;

  Request(const SwapSettings& settings, int64_t t)
      : rate(settings.schedule[2 * (t - 1)]),
        ramp(settings.schedule[2 * (t - 1) + 1]),
        step(t),
        seed(settings.seed),
        pairs(settings.pairs) {}

  int64_t target(const int64_t* first_and_last, int64_t now) const {
    const int64_t first = first_and_last[0], last = first_and_last[1];
    return std::min(now, last + static_cast<int64_t>(std::ceil(static_cast<double>(first - last) * ramp)));
  }
  int64_t granted(int64_t proposed) const {
    return static_cast<int64_t>(std::ceil(static_cast<double>(proposed) * rate));
  }
};

// The swaps of one segment: the first `entered` ranks of `entering` come, the first `left` ranks of `leaving`
// go.
struct Exchange {
  uint64_t threshold;
  int64_t target, proposed, entered, left;
  CandidateList entering, leaving;
  int64_t entering_count, leaving_count;
  std::unique_ptr<uint64_t[]> memory;  // of the lists, when they are not the workspace's
  bool cold;
};

// Puts the first `count` ranks in front, and the last of them at their end.
template <class Before>
void first_ranks(uint64_t* ranks, int64_t count, int64_t total, Before before) {
  if (count > 0) std::nth_element(ranks, ranks + count - 1, ranks + total, before);
}

// Takes the exchange from the candidates that the update emitted; false when they do not suffice.
// The lists hold every score in the window, every kept one up to `lowest_until` and every pruned one from
// `highest_from`, so whatever is chosen inside these bounds is what a scan of all scores would choose.
bool exchange_candidates(const SegmentRecord& record, const Candidates& candidates, const Request& request,
                         const int64_t* first_and_last, Exchange& exchange) {
  const Counts& counts = record.counts;
  const Window& window = record.window;
  if (record.emitted_at != request.step || request.pairs != Pairs::kBest || !candidates.complete())
    return false;
  uint64_t *const kept = candidates.kept.ranks, *const pruned = candidates.pruned.ranks;
  const uint32_t low = rank_key(window.low), high = rank_key(window.high);
  const auto inside = [&](uint64_t rank) { return key_of(rank) >= low && key_of(rank) <= high; };

  std::vector<uint64_t> ranks;  // of both classes inside the window
  ranks.reserve(counts.kept_out + counts.pruned_out);
  std::copy_if(kept, kept + counts.kept_out, std::back_inserter(ranks), inside);
  std::copy_if(pruned, pruned + counts.pruned_out, std::back_inserter(ranks), inside);
  const int64_t target = request.target(first_and_last, counts.kept);
  const int64_t k = target - counts.above;
  if (k < 1 || k > static_cast<int64_t>(ranks.size())) return false;
  first_ranks(ranks.data(), k, ranks.size(), std::greater<uint64_t>());

  exchange.threshold = ranks[k - 1];
  exchange.target = target;
  exchange.proposed =
      counts.pruned_above + std::count_if(pruned, pruned + counts.pruned_out, [&](uint64_t rank) {
        return inside(rank) && rank >= exchange.threshold;
      });
  exchange.entered = request.granted(exchange.proposed);
  exchange.left = exchange.entered + counts.kept - target;
  if (exchange.entered > counts.pruned_out || exchange.left > counts.kept_out) return false;
  first_ranks(pruned, exchange.entered, counts.pruned_out, std::greater<uint64_t>());
  first_ranks(kept, exchange.left, counts.kept_out, std::less<uint64_t>());
  if (exchange.entered && key_of(pruned[exchange.entered - 1]) < rank_key(highest_from(window))) return false;
  if (exchange.left && key_of(kept[exchange.left - 1]) > rank_key(lowest_until(window))) return false;

  exchange.entering = candidates.pruned;
  exchange.leaving = candidates.kept;
  exchange.entering_count = counts.pruned_out;
  exchange.leaving_count = counts.kept_out;
  exchange.cold = false;
  return true;
}

int64_t count_kept(const Segments& segments, int64_t segment) {
  int64_t kept = 0;
  for (int64_t layer = segments.first[segment]; layer < segments.end(segment); ++layer) {
    const Layer& part = segments.layers[layer];
    for (int64_t word = 0; word < part.numel / 32; ++word) kept += __builtin_popcount(part.mask[word]);
    const uint32_t rest = part.numel % 32;  // bits after the last weight mean nothing
    if (rest) kept += __builtin_popcount(part.mask[part.numel / 32] & ((1u << rest) - 1));
  }
  return kept;
}

// Orders the lists as `pairs` chooses: the first of each list swap.
void choose_pairs(const Request& request, Exchange& exchange) {
  uint64_t *const entering = exchange.entering.ranks, *const leaving = exchange.leaving.ranks;
  const int64_t coming = exchange.entering_count, going = exchange.leaving_count;
  const std::less<uint64_t> lowest;
  const std::greater<uint64_t> highest;
  const auto hashed = [&](uint64_t a, uint64_t b) {
    return pair_hash(request.seed, request.step, position_of(a)) <
           pair_hash(request.seed, request.step, position_of(b));
  };
  switch (request.pairs) {
    case Pairs::kBest:
      first_ranks(entering, exchange.entered, coming, highest);
      first_ranks(leaving, exchange.left, going, lowest);
      break;
    case Pairs::kInverse:
      first_ranks(entering, exchange.entered, coming, lowest);
      first_ranks(leaving, exchange.left, going, highest);
      break;
    case Pairs::kRandom:
      first_ranks(entering, exchange.entered, coming, hashed);
      first_ranks(leaving, exchange.left, going, hashed);
      break;
  }
}

// The cold path: thresholds by rank selection over all scores, then one scan for all that cross them.
void exchange_scanned(const Segments& segments, const std::vector<int64_t>& which, const int64_t* num_kept,
                      const Request& request, std::vector<Exchange>& exchanges) {
  const int64_t count = static_cast<int64_t>(which.size());
  std::vector<int64_t> now(count), targets(count);
  parallel_each(count, [&](int64_t i) {
    now[i] = count_kept(segments, which[i]);
    targets[i] = request.target(num_kept + 2 * which[i], now[i]);
  });
  STD_TORCH_CHECK(*std::min_element(now.begin(), now.end()) >= 1,
                  "masks must keep at least one weight of each segment");
  std::vector<uint64_t> thresholds;
  rank_select(segments, which, targets, thresholds);

  for (int64_t i = 0; i < count; ++i) {
    const int64_t numel = segments.numel[which[i]];
    Exchange& exchange = exchanges[which[i]];
    const int64_t leaving = std::min(now[i], numel - targets[i]),
                  entering = std::min(numel - now[i], targets[i]);
    exchange.memory.reset(new uint64_t[entering + leaving]);
    exchange.entering = {exchange.memory.get(), entering};
    exchange.leaving = {exchange.memory.get() + entering, leaving};
    exchange.entering_count = exchange.leaving_count = 0;
    exchange.threshold = thresholds[i];
    exchange.target = targets[i];
    exchange.cold = true;
  }
  parallel_tiles(Tiles(segments, which), [&](const TileRef& ref) {
    uint64_t kept[kTileRanks], pruned[kTileRanks];
    Exchange& exchange = exchanges[segments.layers[ref.layer].segment];
    const float threshold = score_of(exchange.threshold);
    Tile tile = make_tile(segments, ref);
    tile.window = {kInfinity, -kInfinity, threshold, threshold};  // nothing is inside
    tile.kept = kept;
    tile.pruned = pruned;
    const Counts found = tile_kernels().run(tile);
    const auto crosses = [&](uint64_t rank) { return rank < exchange.threshold; };
    const int64_t leaving = std::partition(kept, kept + found.kept_out, crosses) - kept;
    const int64_t entering = std::partition(pruned, pruned + found.pruned_out, std::not_fn(crosses)) - pruned;
    exchange.leaving.append(exchange.leaving_count, kept, leaving);
    exchange.entering.append(exchange.entering_count, pruned, entering);
  });
  parallel_each(count, [&](int64_t i) {
    Exchange& exchange = exchanges[which[i]];
    exchange.proposed = exchange.entering_count;
    exchange.entered = request.granted(exchange.proposed);
    exchange.left = exchange.entered + now[i] - targets[i];
    choose_pairs(request, exchange);
  });
}

// Where the next step's list of one class may end, when `wanted` of it are to swap: at a score that six times
// as many do not reach now, or at the window's own end while the list is too short to tell. Lists of all that
// cross the threshold would be many times as long: to choose from them took 0.25 ms at 20 million weights.
template <class Before>
float next_bound(const CandidateList& list, int64_t count, int64_t taken, int64_t wanted, float shift,
                 float window, Before before) {
  const int64_t left = count - taken;
  if (left < 2 * wanted + 32) return window;
  const int64_t rank = taken + std::min(6 * wanted + 64, left - 1);
  std::nth_element(list.ranks + taken, list.ranks + rank, list.ranks + count, before);
  return score_of(list.ranks[rank]) + shift;
}

// Aims the next step's window: where the threshold will be if it moves on as it did, and three times as wide
// as the last miss, so that a miss is rare and the window holds few.
void arm(SegmentRecord& record, const Exchange& exchange, float threshold, const Request& next,
         const int64_t* first_and_last) {
  const float moved = record.armed ? threshold - record.threshold : 0.0f;
  const float missed = record.armed ? std::fabs(threshold - record.predicted) : std::fabs(threshold) / 4096;
  const float least = std::fabs(threshold) / (1 << 22) + std::numeric_limits<float>::min();
  record.half_width = std::max({3 * missed, record.armed ? 0.9f * record.half_width : 0.0f, least});
  record.threshold = threshold;
  record.predicted = threshold + moved;
  record.armed = 1;
  record.emitted_at = 0;
  Window& window = record.window;
  window.low = record.predicted - record.half_width;
  window.high = record.predicted + record.half_width;
  const int64_t entering = next.granted(exchange.proposed);
  const int64_t leaving = entering + exchange.target - next.target(first_and_last, exchange.target);
  window.kept_high = std::min(window.high, next_bound(exchange.leaving, exchange.leaving_count, exchange.left,
                                                      leaving, moved, window.high, std::less<uint64_t>()));
  window.pruned_low =
      std::max(window.low, next_bound(exchange.entering, exchange.entering_count, exchange.entered, entering,
                                      moved, window.low, std::greater<uint64_t>()));
}

void apply(const Segments& segments, int64_t segment, const Exchange& exchange,
           const std::vector<Patch>& patches) {
  const auto each = [&](const CandidateList& list, int64_t count, auto change) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = position_of(list.ranks[i]);
      const Layer& layer = layer_at(segments, segment, position);
      change(patches[&layer - segments.layers.data()], position - layer.position);
    }
  };
  each(exchange.entering, exchange.entered, [](const Patch& patch, int64_t index) { patch.keep(index); });
  each(exchange.leaving, exchange.left, [](const Patch& patch, int64_t index) { patch.prune(index); });
}

std::vector<Patch> make_patches(const Segments& segments, const Tensors& masks, const Tensors& weights,
                                const Tensors& effective) {
  STD_TORCH_CHECK(weights.size() == effective.size() && (weights.empty() || weights.size() == masks.size()),
                  "weights and effective must both be empty or have one entry a layer");
  std::vector<Patch> patches;
  patches.reserve(masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    patches.emplace_back(masks[i], weights.empty() ? nullptr : &weights[i],
                         weights.empty() ? nullptr : &effective[i], segments.layers[i].numel);
  }
  return patches;
}

}  // namespace

SwapSettings make_swap_settings(const Segments& segments, const Tensors& masks, const Tensors& weights,
                                const Tensors& effective, const Tensor& num_kept, const Tensor& schedule,
                                const std::string& pairs, int64_t seed) {
  STD_TORCH_CHECK(masks.size() == segments.layers.size(), "masks must have one entry a layer");
  require_cpu(num_kept, ScalarType::Long, "num_kept");
  require_cpu(schedule, ScalarType::Double, "schedule");
  STD_TORCH_CHECK(num_kept.numel() == 2 * segments.size(), "num_kept must be [segments, 2]");
  STD_TORCH_CHECK(schedule.dim() == 2 && schedule.size(1) == 2, "schedule must be [steps, 2]");
  const int64_t* const kept = static_cast<const int64_t*>(num_kept.data_ptr());
  STD_TORCH_CHECK(*std::min_element(kept, kept + num_kept.numel()) >= 1, "num_kept must be at least 1");
  return {make_patches(segments, masks, weights, effective),
          kept,
          static_cast<const double*>(schedule.data_ptr()),
          schedule.size(0),
          pairs_named(pairs),
          seed};
}

void require_rates(const SwapSettings& settings, int64_t step) {
  for (const double* rate = settings.schedule + 2 * (step - 1); rate < settings.schedule + 2 * step; ++rate) {
    STD_TORCH_CHECK(*rate >= 0 && *rate <= 1, "schedule must hold rates and ramps in [0, 1], got ", *rate);
  }
}

void swap(const Segments& segments, const SwapSettings& settings, const int64_t* control,
          const std::optional<Workspace>& workspace, int64_t* stats) {
  std::fill_n(stats, 5 * segments.size(), 0);
  if (control[2]) return;
  const int64_t step = control[0];
  STD_TORCH_CHECK(step >= 1 && step <= settings.total_steps, "control[0] must be in [1, ",
                  settings.total_steps, "], the steps of schedule, got ", step);
  require_rates(settings, step);
  const Request request(settings, step), next(settings, std::min(step + 1, settings.total_steps));
  const auto finish = [&](int64_t s, const Exchange& exchange) {
    const float threshold = value_at(segments, s, position_of(exchange.threshold));
    apply(segments, s, exchange, settings.patches);
    const int64_t stat[5] = {exchange.proposed, exchange.entered, exchange.left,
                             static_cast<int32_t>(float_bits(threshold)), exchange.cold};
    std::copy(stat, stat + 5, stats + 5 * s);
    if (workspace) arm(*workspace->records[s], exchange, threshold, next, settings.num_kept + 2 * s);
  };

  std::vector<uint8_t> done(segments.size(), 0);
  if (workspace) {
    parallel_each(segments.size(), [&](int64_t s) {
      Exchange exchange;
      done[s] = exchange_candidates(*workspace->records[s], workspace->candidates[s], request,
                                    settings.num_kept + 2 * s, exchange);
      if (done[s]) finish(s, exchange);
    });
  }
  std::vector<int64_t> cold;
  for (int64_t s = 0; s < segments.size(); ++s) {
    if (!done[s]) cold.push_back(s);
  }
  if (cold.empty()) return;
  std::vector<Exchange> exchanges(segments.size());
  exchange_scanned(segments, cold, settings.num_kept, request, exchanges);
  parallel_each(static_cast<int64_t>(cold.size()), [&](int64_t i) { finish(cold[i], exchanges[cold[i]]); });
}

namespace {

Tensor swap_(const Tensors& scores, const Tensors& masks, const Tensors& weights, const Tensors& effective,
             const Tensor& num_kept, const Tensor& schedule, const Tensor& control, bool joint,
             const std::string& pairs, int64_t seed, const std::optional<Tensor>& workspace) {
  const Segments segments = make_segments(scores, masks, joint);
  const SwapSettings settings =
      make_swap_settings(segments, masks, weights, effective, num_kept, schedule, pairs, seed);
  Tensor stats = empty({segments.size(), 5}, ScalarType::Long);
  swap(segments, settings, control_of(control), make_workspace(segments, workspace),
       stats_of(stats, segments));
  return stats;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) { m.impl("swap_", TORCH_BOX(&jackpot::swap_)); }
