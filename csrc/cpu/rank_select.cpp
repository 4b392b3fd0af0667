#include "rank_select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "../order.h"
#include "candidates.h"
#include "parallel.h"

namespace jackpot {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A window that a sample says will hold the k-th ranked element: four deviations of the sample's rank either
// way.
Window sampled_window(const Segments& segments, int64_t segment, int64_t k) {
  const int64_t numel = segments.numel[segment];
  const int64_t size = std::clamp<int64_t>(numel / 64, 1024, 32768);
  std::vector<float> sample;
  sample.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t draw = pair_hash(0, 0, static_cast<uint32_t>(i));
    const float value = value_at(segments, segment, static_cast<int64_t>(draw % numel));
    if (!std::isnan(value)) sample.push_back(value);
  }
  const int64_t found = static_cast<int64_t>(sample.size());
  const double share = static_cast<double>(k) / static_cast<double>(numel);
  const double margin = 4 * std::sqrt(share * (1 - share) * static_cast<double>(size)) + 2;
  const auto quantile = [&](double at, float beyond_top, float beyond_bottom) {
    const int64_t rank = static_cast<int64_t>(std::floor(at));
    if (rank < 0) return beyond_top;
    if (rank >= found) return beyond_bottom;
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<float>());
    return sample[rank];
  };
  const double center = share * static_cast<double>(size);
  Window window = {};
  window.high = quantile(center - margin, kInfinity, -kInfinity);
  window.low = quantile(center + margin, kInfinity, -kInfinity);
  window.kept_high = -kInfinity;
  window.pruned_low = kInfinity;
  return window;
}

// Histogram of one digit of the keys that share the digits above it.
uint64_t radix_select(const Segments& segments, int64_t segment, int64_t k) {
  constexpr int kDigits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  int shift = 32;
  for (const int digit : kDigits) {
    shift -= digit;
    std::vector<int64_t> histogram(size_t{1} << digit, 0);
    for (int64_t layer = segments.first[segment]; layer < segments.end(segment); ++layer) {
      const Layer& part = segments.layers[layer];
      for (int64_t i = 0; i < part.numel; ++i) {
        const uint64_t key = rank_key(part.scores[i]);
        if (key >> (shift + digit) == prefix) ++histogram[(key >> shift) & ((1u << digit) - 1)];
      }
    }
    uint32_t bin = (1u << digit) - 1;
    for (; k > histogram[bin]; --bin) k -= histogram[bin];
    prefix = prefix << digit | bin;
  }
  for (int64_t layer = segments.first[segment];; ++layer) {  // the k-th of the equal keys, by position
    const Layer& part = segments.layers[layer];
    for (int64_t i = 0; i < part.numel; ++i) {
      if (rank_key(part.scores[i]) == prefix && --k == 0) {
        return rank_of(part.scores[i], static_cast<uint32_t>(part.position + i));
      }
    }
  }
}

}  // namespace

void rank_select(const Segments& segments, const std::vector<int64_t>& which, const std::vector<int64_t>& ks,
                 std::vector<uint64_t>& ranks) {
  const int64_t count = static_cast<int64_t>(which.size());
  std::vector<Counts> counts(count);
  std::vector<Candidates> found;
  std::vector<Window> windows(count);
  std::vector<std::unique_ptr<uint64_t[]>> memory(count);
  std::vector<int64_t> request_of(segments.size());
  parallel_each(count, [&](int64_t i) { windows[i] = sampled_window(segments, which[i], ks[i]); });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t capacity = segments.numel[which[i]] / 8 + 2048;
    memory[i].reset(new uint64_t[capacity]);
    found.push_back({&counts[i], {nullptr, 0}, {memory[i].get(), capacity}});
    request_of[which[i]] = i;
  }
  parallel_tiles(Tiles(segments, which), [&](const TileRef& ref) {
    uint64_t kept[kTileRanks], pruned[kTileRanks];
    const int64_t request = request_of[segments.layers[ref.layer].segment];
    Tile tile = make_tile(segments, ref);
    tile.mask = nullptr;  // every element is a candidate of one list
    tile.window = windows[request];
    tile.kept = kept;
    tile.pruned = pruned;
    found[request].append(tile, tile_kernels().run(tile));
  });
  ranks.resize(count);
  parallel_each(count, [&](int64_t i) {
    uint64_t* const begin = found[i].pruned.ranks;
    uint64_t* end = begin;
    if (found[i].complete()) {  // infinities and NaN above the window are emitted too
      const uint32_t low = rank_key(windows[i].low), high = rank_key(windows[i].high);
      end = std::partition(begin, begin + counts[i].pruned_out,
                           [&](uint64_t rank) { return key_of(rank) >= low && key_of(rank) <= high; });
    }
    const int64_t k = ks[i] - counts[i].above;
    if (k < 1 || k > end - begin) {
      ranks[i] = radix_select(segments, which[i], ks[i]);
      return;
    }
    std::nth_element(begin, begin + k - 1, end, std::greater<uint64_t>());
    ranks[i] = begin[k - 1];
  });
}

}  // namespace jackpot
