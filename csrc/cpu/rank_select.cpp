#include "rank_select.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "../order.h"
#include "candidates.h"
#include "parallel.h"

namespace jackpot {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kLine = 16;  // neighbours in memory, which cost no more than one

using Pivots = std::array<float, kPivots>;

// One segment, gone through by all threads or by this one.
struct Scan {
  const Segments& segments;
  int64_t segment;
  bool shared;
  Tiles tiles;

  void add(int64_t& sum, int64_t count) const {
    if (shared) {
      __atomic_fetch_add(&sum, count, __ATOMIC_RELAXED);
    } else {
      sum += count;
    }
  }

  template <class Body>
  void each(const Body& body) const {
    if (shared) {
      parallel_tiles(tiles, body);
    } else {
      tiles.each(0, tiles.size(), body);
    }
  }
};

// Where the k-th ranked value is, or above it where it is NaN; and how many values are how high.
struct Range {
  float low, high;
  int64_t from_low, above_high;

  int64_t inside() const { return from_low - above_high; }
};

// Values from places spread over a segment, none of them NaN.
std::vector<float> sample(const Segments& segments, int64_t segment) {
  struct Line {
    const float* values;
    int64_t count;
  };
  const int64_t numel = segments.numel[segment];
  std::vector<Line> lines(std::clamp<int64_t>(numel / 8192, 6, 256));
  const int64_t part = numel / static_cast<int64_t>(lines.size());
  for (size_t i = 0; i < lines.size(); ++i) {
    // Anywhere in the i-th part, so that no pattern in the weights can meet one in the places.
    const uint64_t place = pair_hash(0, 0, static_cast<uint32_t>(i)) % (part + 1);
    const int64_t position = std::min<int64_t>(numel - 1, i * part + place);
    const Layer& layer = layer_at(segments, segment, position);
    lines[i] = {layer.scores + (position - layer.position),
                std::min(kLine, layer.position + layer.numel - position)};
    __builtin_prefetch(lines[i].values);
    __builtin_prefetch(lines[i].values + lines[i].count - 1);
  }
  std::vector<float> values;
  values.reserve(lines.size() * kLine);
  for (const Line& line : lines) {
    std::copy_if(line.values, line.values + line.count, std::back_inserter(values),
                 [](float value) { return !std::isnan(value); });
  }
  return values;
}

// Values of a sample around where the k-th should be, closest where it is most likely.  // ascending
Pivots sampled_pivots(const Segments& segments, int64_t segment, int64_t k) {
  constexpr double kDeviations[kPivots] = {2, 0.6, -0.6, -2};
  std::vector<float> values = sample(segments, segment);
  Pivots pivots = {};
  if (values.empty()) return pivots;  // all that was met is NaN
  const double size = static_cast<double>(values.size());
  const double share = static_cast<double>(k) / static_cast<double>(segments.numel[segment]);
  const double deviation = std::sqrt(share * (1 - share) * size) + 1;
  std::array<int64_t, kPivots> ranks;
  for (int j = 0; j < kPivots; ++j) {
    ranks[j] = static_cast<int64_t>(std::clamp(share * size + kDeviations[j] * deviation, 0.0, size - 1));
  }
  const auto first = values.begin() + ranks.back(), last = values.begin() + ranks.front();
  const std::greater<float> before;
  std::nth_element(values.begin(), first, values.end(), before);
  std::nth_element(first, last, values.end(), before);
  std::sort(first, last, before);
  for (int j = 0; j < kPivots; ++j) pivots[j] = values[ranks[j]];
  return pivots;
}

float value_of_key(uint32_t key) { return score_of(static_cast<uint64_t>(key) << 32); }

float value_before(float value) {
  const uint32_t key = rank_key(value);
  return value_of_key(key == rank_key(0.0f) ? key - 2 : key - 1);  // past -0, which equals +0
}

// The value after the lowest, which tells whether that one is the k-th, and others evenly up to the highest.
Pivots even_pivots(const Range& range) {
  const uint32_t low = rank_key(range.low), high = rank_key(range.high);
  Pivots pivots;
  for (int j = 0; j < kPivots; ++j) {
    const uint64_t step = static_cast<uint64_t>(high - low) * j / kPivots;
    pivots[j] = value_of_key(low + std::max<uint32_t>(1, static_cast<uint32_t>(step)));
  }
  return pivots;
}

void narrow(const Scan& scan, int64_t k, const Pivots& pivots, Range& range) {
  std::array<int64_t, kPivots> counts = {};
  scan.each([&](const TileRef& ref) {
    int64_t found[kPivots];
    const float* const values = scan.segments.layers[ref.layer].scores + ref.begin;
    tile_kernels().count_from(values, ref.count, pivots.data(), found);
    for (int j = 0; j < kPivots; ++j) scan.add(counts[j], found[j]);
  });
  int beyond = 0;  // the first pivot that the k-th does not reach
  while (beyond < kPivots && counts[beyond] >= k) ++beyond;
  if (beyond > 0) {
    range.low = pivots[beyond - 1];
    range.from_low = counts[beyond - 1];
  }
  if (beyond < kPivots) {
    range.high = value_before(pivots[beyond]);
    range.above_high = counts[beyond];
  }
}

// Where the k-th is, give or take four deviations and what the guess may be off by: a tenth of the range or
// so, for to take it all cost ResNet-32's 32 layers a third of the whole. The guess is that values go with
// their ranks' logits, as a logistic distribution's do; that they lie evenly was too far off for one layer in
// nine.
Range likely(const Range& range, int64_t k, int64_t numel) {
  const double inside = static_cast<double>(range.inside());
  const double share = static_cast<double>(k - range.above_high) / inside;
  const double margin = 4 * std::sqrt(share * (1 - share) * inside) + inside / 128 + 8;
  const double above = static_cast<double>(range.above_high), up_to = static_cast<double>(range.from_low);
  const auto logit = [&](double rank) { return std::log((rank + 0.5) / (numel - rank + 0.5)); };
  const double first = logit(above), last = logit(up_to);
  const double width = static_cast<double>(range.high) - range.low;
  const auto value = [&](double rank) {
    const double part = (logit(std::clamp(rank, above, up_to)) - first) / (last - first);
    // Where the two ends are far apart, the difference may fall below the lower one by rounding.
    return std::max(range.low, static_cast<float>(range.high - part * width));
  };
  return {value(k + margin), value(k - margin), range.from_low, range.above_high};
}

// The k-th where few values are in the range; 0 when it is not there, as NaN never is.
uint64_t select_inside(const Scan& scan, int64_t k, const Range& range) {
  const std::unique_ptr<uint64_t[]> memory(new uint64_t[range.inside()]);
  const CandidateList list = {memory.get(), range.inside()};
  int64_t inside = 0, above = 0;
  scan.each([&](const TileRef& ref) {
    uint64_t ranks[kTileRanks];
    const Layer& layer = scan.segments.layers[ref.layer];
    const uint32_t position = static_cast<uint32_t>(layer.position + ref.begin);
    int64_t higher = 0;
    const int64_t found = tile_kernels().collect(layer.scores + ref.begin, ref.count, position, range.low,
                                                 range.high, ranks, higher);
    list.append(inside, ranks, found);
    scan.add(above, higher);
  });
  if (above >= k || above + inside < k || inside > list.capacity) return 0;
  uint64_t* const kth = memory.get() + (k - above - 1);
  std::nth_element(memory.get(), kth, memory.get() + inside, std::greater<uint64_t>());
  return *kth;
}

// The k-th where it is one of many that are equal: the one whose position says so.
uint64_t select_equal(const Scan& scan, int64_t k, uint32_t key) {
  const auto first = scan.segments.layers.begin() + scan.segments.first[scan.segment];
  const auto end = scan.segments.layers.begin() + scan.segments.end(scan.segment);
  for (auto layer = first; layer < end; ++layer) {
    k -= std::count_if(layer->scores, layer->scores + layer->numel,
                       [&](float value) { return rank_key(value) > key; });
  }
  for (auto layer = first; layer < end; ++layer) {
    for (int64_t i = 0; i < layer->numel; ++i) {
      if (rank_key(layer->scores[i]) == key && --k == 0) {
        return rank_of(layer->scores[i], static_cast<uint32_t>(layer->position + i));
      }
    }
  }
  return 0;  // it ranks above them
}

uint64_t select(const Scan& scan, int64_t k) {
  const int64_t numel = scan.segments.numel[scan.segment], few = numel / 16 + 1024;
  Range range = {-kInfinity, kInfinity, numel, 0};
  if (numel > few) narrow(scan, k, sampled_pivots(scan.segments, scan.segment, k), range);
  while (range.inside() > few && range.low < range.high) narrow(scan, k, even_pivots(range), range);
  uint64_t rank = 0;
  if (range.inside() > few) {
    rank = select_equal(scan, k, rank_key(range.low));
  } else {
    if (std::isfinite(range.high - range.low)) rank = select_inside(scan, k, likely(range, k, numel));
    if (!rank) rank = select_inside(scan, k, range);
  }
  return rank ? rank : select_equal(scan, k, rank_key(std::numeric_limits<float>::quiet_NaN()));
}

}  // namespace

void rank_select(const Segments& segments, const std::vector<int64_t>& which, const std::vector<int64_t>& ks,
                 std::vector<uint64_t>& ranks) {
  const WithSubnormals floats;
  const int64_t count = static_cast<int64_t>(which.size());
  ranks.resize(count);
  int64_t total = 0;
  for (const int64_t segment : which) total += segments.numel[segment];
  const auto numel = [&](int64_t i) { return segments.numel[which[i]]; };
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return numel(i) > numel(j); });
  const auto select_at = [&](int64_t i, bool shared) {
    ranks[i] = select({segments, which[i], shared, Tiles(segments, {which[i]})}, ks[i]);
  };
  // A segment that is more than one thread's share is gone through by all threads, the others by one each,
  // large ones first, so that none is left with a large one when the rest are done.
  const int64_t share = std::max<int64_t>(kTile, total / torch::stable::get_num_threads());
  int64_t shared = 0;
  while (shared < count && numel(order[shared]) > share) select_at(order[shared++], true);
  parallel_each(count - shared, [&](int64_t i) { select_at(order[shared + i], false); });
}

}  // namespace jackpot
