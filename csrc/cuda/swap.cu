// Threshold, choice of the swaps and the swaps themselves, for every segment. One block a segment works on
// the candidates that the update emitted; where they do not suffice, all blocks scan the scores, in a second
// launch that else ends at once.
#include <cfloat>
#include <cmath>

#include "convert.cuh"
#include "launch.h"
#include "select.cuh"

namespace jackpot {
namespace {

constexpr uint32_t kSelectThreads = 1024, kScanThreads = 512;

// Candidates beyond this many are faster to find again by all blocks. Sixteen bits count those of a bin.
constexpr uint32_t kMostForOneBlock = 0xffff;

// The problems of Stage::kCuts.
enum { kEntering, kLeaving, kEnteringBound, kLeavingBound };

// What the schedules and the person ask of a segment in this step.
struct Request {
  bool active;
  int64_t step;
  double rate, ramp;
  double next_rate, next_ramp;
  int64_t first, last;

  __device__ uint32_t target(uint32_t now) const { return target(now, ramp); }
  __device__ uint32_t granted(uint32_t proposed) const { return granted(proposed, rate); }
  __device__ uint32_t next_target(uint32_t now) const { return target(now, next_ramp); }
  __device__ uint32_t next_granted(uint32_t proposed) const { return granted(proposed, next_rate); }

 private:
  __device__ uint32_t target(uint32_t now, double at) const {
    const int64_t wanted =
        last + static_cast<int64_t>(ceil(__dmul_rn(static_cast<double>(first - last), at)));
    return static_cast<uint32_t>(wanted < 1 ? 1 : wanted < now ? wanted : now);
  }
  static __device__ uint32_t granted(uint32_t proposed, double at) {
    const double share = ceil(__dmul_rn(static_cast<double>(proposed), at));
    return share < proposed ? static_cast<uint32_t>(share) : proposed;
  }
};

// A step outside the schedule swaps nothing, as one that was skipped.
__device__ Request request_of(const SwapTable& table, uint32_t number) {
  const int64_t step = table.control[0], skipped = table.control[2];
  const int64_t first = table.num_kept[2 * number], last = table.num_kept[2 * number + 1];
  if (skipped || step < 1 || step > table.steps) return {};
  const double* const row = table.schedule + 2 * (step - 1);
  const double* const next = step < table.steps ? row + 2 : row;
  return {true, step, row[0], row[1], next[0], next[1], first, last};
}

__device__ const Place& last_place(const SwapTable& table, uint32_t number) {
  return table.layers[table.joint ? table.count - 1 : number].place;
}

__device__ uint32_t numel_of(const SwapTable& table, uint32_t number) {
  const Place& last = last_place(table, number);
  return last.position + last.numel;
}

__device__ const SwapLayer& layer_at(const SwapTable& table, uint32_t number, uint32_t position) {
  if (!table.joint) return table.layers[number];
  return table.layers[layer_from<&Place::position>(table.layers, table.count, position)];
}

// Of the values that cross the threshold, those with the largest priority swap.
__device__ uint64_t priority_of(const SwapTable& table, int64_t step, uint64_t rank, bool entering) {
  if (table.pairs == Pairs::kRandom) return ~pair_hash(table.seed, step, position_of(rank));
  return (table.pairs == Pairs::kBest) == entering ? rank : ~rank;
}

__device__ void change(const SwapLayer& layer, uint32_t index, bool keep) {
  const uint32_t bit = 1u << index % 32;
  if (keep) {
    atomicOr(&layer.mask[index / 32], bit);
  } else {
    atomicAnd(&layer.mask[index / 32], ~bit);
  }
  if (!layer.effective) return;
  int64_t from = 0, to = 0;
#pragma unroll 1
  for (uint32_t dim = layer.num_dims; dim-- > 0;) {
    const Dim& d = layer.dims[dim];
    const int64_t i = index % d.size;
    from += i * d.weight_stride;
    to += i * d.effective_stride;
    index /= d.size;
  }
  const double value = keep ? load_as_double(layer.weight, layer.weight_dtype, from) : 0.0;
  store_as(layer.effective, layer.effective_dtype, to, value);
}

// Asks for the weight of a value that may enter, while the cuts are sought: a thread that swaps several waits
// for one after the other. Not worth the divisions of more dimensions.
__device__ void prefetch_weight(const SwapTable& table, uint32_t number, uint64_t rank) {
  const SwapLayer& layer = layer_at(table, number, position_of(rank));
  if (!layer.effective || layer.num_dims != 1) return;
  const int64_t at = int64_t{position_of(rank) - layer.place.position} * layer.dims[0].weight_stride;
  prefetch(static_cast<const char*>(layer.weight) + at * size_of(layer.weight_dtype));
}

__device__ void swap_bit(const SwapTable& table, uint32_t number, uint64_t rank, bool keep) {
  const SwapLayer& layer = layer_at(table, number, position_of(rank));
  change(layer, position_of(rank) - layer.place.position, keep);
}

__device__ void write_stats(const SwapTable& table, uint32_t number, const Plan& plan, float threshold,
                            bool cold) {
  int64_t* const row = table.stats + 5 * number;
  row[0] = plan.proposed;
  row[1] = plan.entered;
  row[2] = plan.left;
  row[3] = static_cast<int32_t>(float_bits(threshold));
  row[4] = cold;
}

// The last rank that the next step's list of a class needs, in a list of `count` of which `taken` swap now
// and `wanted` then: six times as many. 0 if the list is too short to tell.
__device__ uint32_t bound_rank(uint32_t count, uint32_t taken, uint32_t wanted) {
  const int64_t left = int64_t{count} - taken, reach = 6 * int64_t{wanted} + 65;
  if (left < 2 * int64_t{wanted} + 32) return 0;
  return static_cast<uint32_t>(taken + (reach < left ? reach : left));
}

// Both lists' such ranks.
struct Bounds {
  uint32_t entering, leaving;

  __device__ Bounds(const Request& request, const Plan& plan, uint32_t pruned, uint32_t kept) {
    const uint32_t wanted = request.next_granted(plan.proposed);
    entering = bound_rank(pruned, plan.entered, wanted);
    leaving = bound_rank(kept, plan.left, wanted + plan.target - request.next_target(plan.target));
  }
};

// Aims the next step's window: where the threshold will be if it moves on as it did, and three times as wide
// as the last miss. The lists' ends follow the threshold, too; a bound of 0 is the window's own.
__device__ void arm(Segment& segment, float threshold, uint64_t entering_bound, uint64_t leaving_bound) {
  const bool armed = segment.armed;
  const float moved = armed ? threshold - segment.threshold : 0.0f;
  const float missed = fabsf(armed ? threshold - segment.predicted : threshold / 4096);
  const float least = fabsf(threshold) / (1 << 22) + FLT_MIN;
  segment.half_width = fmaxf(fmaxf(3 * missed, armed ? 0.9f * segment.half_width : 0.0f), least);
  segment.threshold = threshold;
  segment.predicted = threshold + moved;
  segment.armed = 1;
  segment.emitted_at = 0;
  Window& window = segment.window;
  window.low = segment.predicted - segment.half_width;
  window.high = segment.predicted + segment.half_width;
  window.pruned_low = entering_bound ? fmaxf(score_of(entering_bound) + moved, window.low) : window.low;
  window.kept_high = leaving_bound ? fminf(score_of(leaving_bound) + moved, window.high) : window.high;
}

__device__ float score_at(const SwapTable& table, uint32_t number, uint64_t rank) {
  const SwapLayer& layer = layer_at(table, number, position_of(rank));
  return layer.scores[position_of(rank) - layer.place.position];
}

// ---- one block, on the candidates of a segment

constexpr uint32_t kListBatch = 4;

// The candidates of both classes, the pruned ones first, as values of which the largest of a class swap:
// ranks of the pruned, turned ranks of the kept.
struct Lists {
  const uint64_t* ranks;
  uint32_t pruned_at, num_pruned, count;

  // visit(value, leaves) for the thread's share, some of which are on their way at a time. A kernel that runs
  // once on a multiprocessor waits for its own instructions, too, so those of `visit` are there once.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll 1
    for (uint32_t first = threadIdx.x; first < count; first += kListBatch * blockDim.x) {
      uint64_t batch[kListBatch];
#pragma unroll
      for (uint32_t i = 0; i < kListBatch; ++i) {
        const uint32_t at = first + i * blockDim.x;
        batch[i] = at < count ? ranks[at < num_pruned ? pruned_at + at : at - num_pruned] : 0;
      }
#pragma unroll 1
      for (uint32_t i = 0, at = first; i < kListBatch && at < count; ++i, at += blockDim.x) {
        const bool leaves = at >= num_pruned;
        visit(leaves ? ~batch[0] : batch[0], leaves);
#pragma unroll
        for (uint32_t j = 1; j < kListBatch; ++j) batch[j - 1] = batch[j];
      }
    }
  }
};

// Values from `low` to low + range, of which there are `count`, and the k-th of them from the top is sought.
struct Choice {
  uint64_t low, range;
  uint32_t k, count;

  __device__ bool has(uint64_t value) const { return value - low <= range; }
};

// Of so few values each is compared with all the others.
constexpr uint32_t kFew = 256;

struct PickShared : SelectShared {
  Choice choices[2];
  uint64_t few[2][kFew], cuts[2], bounds[2];
  uint32_t num_few[2], crossing;
};

// All threads must have seen what was chosen before.
__device__ void reset_choices(PickShared& shared) {
  if (threadIdx.x >= 2) return;
  shared.choices[threadIdx.x] = {};
  shared.bounds[threadIdx.x] = 0;
  shared.num_few[threadIdx.x] = 0;
}

// Equal bins of the keys from `low` to low + range.
struct WindowBins {
  uint32_t low, range, shift;

  __device__ WindowBins(uint32_t first, uint32_t last) : low(first), range(last - first) {
    const uint32_t width = 64 - __clzll(range | 1);
    shift = width > kDigit ? width - kDigit : 0;
  }
  __device__ bool has(uint32_t key) const { return key - low <= range; }
  __device__ uint32_t of(uint32_t key) const { return (key - low) >> shift; }
  __device__ uint32_t first(uint32_t bin) const { return low + (bin << shift); }
  __device__ uint32_t last(uint32_t bin) const {
    const uint32_t most = range - (bin << shift), width = 1u << shift;
    return first(bin) + (most < width ? most : width - 1);
  }
};

// Bins that grow with the distance of a key from where its list begins, 64 for each doubling: wherever the
// largest values lie, one look tells most of them apart.
struct ListBins {
  uint32_t low;

  __device__ bool has(uint32_t key) const { return key >= low; }
  __device__ uint32_t of(uint32_t key) const {
    const uint32_t distance = key - low, doublings = 57 - __clzll(distance | 64);
    return 64 * doublings + (distance >> doublings);
  }
  __device__ uint32_t first(uint32_t bin) const {
    return low + ((bin - 64 * doublings_of(bin)) << doublings_of(bin));
  }
  __device__ uint32_t last(uint32_t bin) const {
    const uint32_t most = ~first(bin), width = 1u << doublings_of(bin);
    return first(bin) + (most < width ? most : width - 1);
  }

 private:
  static __device__ uint32_t doublings_of(uint32_t bin) { return bin < 128 ? 0 : bin / 64 - 1; }
};

// The bins of a histogram that a thread looks after, from the top one down: sixteen bits of each count.
struct Share {
  const uint32_t* histogram;
  uint32_t shift, before, sum;  // of the bins above, and of these

  // found(bin, k, count) in the thread whose bins hold the k-th value: it is the new k-th of `count` in a
  // bin.
  template <class Found>
  __device__ void find(uint32_t k, const Found& found) const {
    uint32_t above = before >> shift & 0xffff;
    if (k <= above || k > above + (sum >> shift & 0xffff)) return;
    uint32_t bin = kBins - 1 - threadIdx.x * (kBins / blockDim.x);
    for (uint32_t count;; above += count, --bin) {
      count = histogram[bin] >> shift & 0xffff;
      if (k <= above + count) return found(bin, k - above, count);
    }
  }

  template <class Bins>
  __device__ void choose(uint32_t k, const Bins& bins, Choice& choice) const {
    find(k, [&](uint32_t bin, uint32_t left, uint32_t count) {
      const uint32_t low = bins.first(bin), range = bins.last(bin) - low;
      choice = {uint64_t{low} << 32, uint64_t{range} << 32 | 0xffffffffu, left, count};
    });
  }
};

// All threads must come here, and see the histogram.
__device__ Share share_of(const uint32_t* histogram, SumScratch& scratch) {
  const uint32_t each = kBins / blockDim.x, top = kBins - 1 - threadIdx.x * each;
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < each; ++i) sum += histogram[top - i];
  return {histogram, 0, sum_up_to(sum, scratch) - sum, sum};
}

// The values of one list, or with `all` the ranks of both as the first.
__device__ uint64_t value_in(bool all, uint64_t value, bool leaves, uint32_t& which) {
  which = !all && leaves;
  return all && leaves ? ~value : value;
}

// Sets the cuts to the values that shared.choices seek, in both lists side by side, or with `all` the first
// of them in the ranks of both lists together.
__device__ void pick(const Lists& lists, bool all, PickShared& shared) {
#pragma unroll 1
  for (uint32_t i = 0; i < 2; ++i) {
    Choice& choice = shared.choices[i];
    while (choice.count > kFew) {  // a digit of the distance a round
      const uint32_t width = 64 - __clzll(choice.range), shift = width > kDigit ? width - kDigit : 0;
      uint32_t* const histogram = shared.histograms[2];
      clear(histogram);
      __syncthreads();
      lists.each([&](uint64_t value, bool leaves) {
        uint32_t which;
        value = value_in(all, value, leaves, which);
        if (which == i && choice.has(value)) atomicAdd(&histogram[(value - choice.low) >> shift], 1u);
      });
      __syncthreads();
      find_bin(histogram, choice.k, shared);
      if (threadIdx.x == 0) {
        const Bin& bin = shared.bin;
        const uint64_t before = uint64_t{bin.bin} << shift, last = (1ull << shift) - 1;
        const uint64_t range = choice.range - before;
        choice = {choice.low + before, range < last ? range : last, bin.k, bin.count};
      }
      __syncthreads();
    }
  }
  lists.each([&](uint64_t value, bool leaves) {
    uint32_t which;
    value = value_in(all, value, leaves, which);
    const Choice& choice = shared.choices[which];
    if (choice.count && choice.has(value)) shared.few[which][atomicAdd(&shared.num_few[which], 1u)] = value;
  });
  __syncthreads();
  const uint32_t first = shared.choices[0].count, both = first + shared.choices[1].count;
#pragma unroll 1
  for (uint32_t at = threadIdx.x / kWarp; at < both; at += blockDim.x / kWarp) {
    const uint32_t which = at >= first;
    const Choice& choice = shared.choices[which];
    const uint64_t* const few = shared.few[which];
    const uint64_t value = few[which ? at - first : at];
    uint32_t larger = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarp; i < choice.count; i += kWarp) larger += few[i] > value;
    larger = __reduce_add_sync(kAllLanes, larger);
    if (threadIdx.x % kWarp == 0 && larger == choice.k - 1) shared.cuts[which] = value;
  }
  __syncthreads();
}

// What the update has left of a segment's candidates.
struct Emitted {
  int64_t step;
  Window window;
  Counts counts;

  // All conditions are looked at together, for each would wait for memory of its own.
  __device__ bool suffices(const SwapTable& table, int64_t now, uint32_t numel) const {
    const uint32_t capacity = candidate_capacity(numel);
    return static_cast<uint32_t>(step == now) & (table.pairs == Pairs::kBest) &
           (counts.kept_out <= capacity) & (counts.pruned_out <= capacity) &
           (counts.kept_out + counts.pruned_out <= kMostForOneBlock) & (window.low <= window.high);
  }
};

// The swaps of a segment, taken from its candidates. One look at the lists sorts them into bins by their
// keys, of which the rest needs only those that hold a value sought.
//
// The lists hold every score in the window, every kept one up to `lowest_until` and every pruned one from
// `highest_from`, so whatever is chosen inside these bounds is what a scan of all scores would choose.
class CandidateSwap {
 public:
  __device__ CandidateSwap(const SwapTable& table, uint32_t number, const Emitted& emitted,
                           PickShared& shared)
      : table_(table),
        number_(number),
        counts_(emitted.counts),
        lists_(lists_of(table, number, emitted.counts)),
        inside_(rank_key(emitted.window.low), rank_key(emitted.window.high)),
        entering_{rank_key(highest_from(emitted.window))},
        leaving_{~rank_key(lowest_until(emitted.window))},
        shared_(shared) {}

  // False if the candidates do not suffice; then nothing has changed. All threads get the same answer.
  __device__ bool run(const Request& request) {
    sort_into_bins();
    plan_.kept = counts_.kept;
    plan_.target = request.target(plan_.kept);
    if (plan_.target <= counts_.above) return false;
    share_of(shared_.histograms[0], shared_.sums)
        .choose(plan_.target - counts_.above, inside_, shared_.choices[0]);
    Share share = share_of(shared_.histograms[1], shared_.sums);
    if (shared_.choices[0].count == 0) return false;
    pick(lists_, true, shared_);
    const uint64_t threshold = shared_.cuts[0];
    const float score = threadIdx.x == 0 ? score_at(table_, number_, threshold) : 0;  // on its way from here

    count_crossing(threshold);
    reset_choices(shared_);
    __syncthreads();
    plan_.proposed = counts_.pruned_above + shared_.crossing;
    plan_.entered = request.granted(plan_.proposed);
    plan_.left = plan_.entered + plan_.kept - plan_.target;
    choose_swaps(share, Bounds(request, plan_, counts_.pruned_out, counts_.kept_out));
    if (plan_.entered && shared_.choices[0].count == 0) return false;
    if (plan_.left && shared_.choices[1].count == 0) return false;
    pick(lists_, false, shared_);
    apply(score);
    return true;
  }

 private:
  static __device__ Lists lists_of(const SwapTable& table, uint32_t number, const Counts& counts) {
    const uint64_t* const ranks = table.ranks + table.layers[number].place.lists;
    const uint32_t capacity = candidate_capacity(numel_of(table, number));
    return {ranks, capacity, counts.pruned_out, counts.pruned_out + counts.kept_out};
  }

  // The window's bins are the first histogram; those of the lists the second, of the leaving in the upper
  // halves.
  __device__ void sort_into_bins() {
    uint32_t *const in_window = shared_.histograms[0], *const in_lists = shared_.histograms[1];
    __syncthreads();
    clear(in_window);
    clear(in_lists);
    reset_choices(shared_);
    if (threadIdx.x == 0) shared_.crossing = 0;
    __syncthreads();
    lists_.each([&](uint64_t value, bool leaves) {
      const uint32_t key = key_of(value), score = leaves ? ~key : key;
      const ListBins bins = leaves ? leaving_ : entering_;
      if (inside_.has(score)) atomicAdd(&in_window[inside_.of(score)], 1u);
      if (bins.has(key)) atomicAdd(&in_lists[bins.of(key)], leaves ? 1u << 16 : 1u);
    });
    __syncthreads();
  }

  // Of the pruned in the window, those from the threshold on.
  __device__ void count_crossing(uint64_t threshold) {
    uint32_t crossing = 0;
    lists_.each([&](uint64_t value, bool leaves) {
      if (leaves || value < threshold) return;
      crossing += inside_.has(key_of(value));
      prefetch_weight(table_, number_, value);
    });
    crossing = __reduce_add_sync(kAllLanes, crossing);
    if (threadIdx.x % kWarp == 0 && crossing) atomicAdd(&shared_.crossing, crossing);
  }

  __device__ void choose_swaps(Share share, const Bounds& bounds) {
#pragma unroll 1
    for (uint32_t i = 0; i < 2; ++i) {
      const ListBins bins = i ? leaving_ : entering_;
      share.shift = 16 * i;
      share.choose(i ? plan_.left : plan_.entered, bins, shared_.choices[i]);
      share.find(i ? bounds.leaving : bounds.entering, [&](uint32_t bin, uint32_t, uint32_t) {
        shared_.bounds[i] = uint64_t{bins.first(bin)} << 32;
      });
    }
    __syncthreads();
  }

  __device__ void apply(float threshold) {
    lists_.each([&](uint64_t value, bool leaves) {
      if ((leaves ? plan_.left : plan_.entered) == 0 || value < shared_.cuts[leaves]) return;
      swap_bit(table_, number_, leaves ? ~value : value, !leaves);
    });
    if (threadIdx.x != 0) return;
    write_stats(table_, number_, plan_, threshold, false);
    arm(table_.segments[number_], threshold, shared_.bounds[0], shared_.bounds[1] ? ~shared_.bounds[1] : 0);
  }

  const SwapTable& table_;
  const uint32_t number_;
  const Counts counts_;
  const Lists lists_;
  const WindowBins inside_;
  const ListBins entering_, leaving_;
  PickShared& shared_;
  Plan plan_ = {};
};

__device__ void start_rounds(const SwapTable& table, uint32_t number) {
  Segment& segment = table.segments[number];
  segment.plan = {};
  segment.plan.stage = Stage::kThreshold;
  segment.plan.first = 1;
  segment.plan.problems[0] = {0, 0, 64, false};
  segment.tally = {};
  segment.round = 0;
  // One addition gives the segment and its tiles their places.
  auto* const cold = reinterpret_cast<unsigned long long*>(&table.header->counters.cold);
  const unsigned long long before = atomicAdd(cold, 1ull << 32 | tiles_of(table, number));
  table.header->cold[before >> 32] = {number, static_cast<uint32_t>(before)};
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const __grid_constant__ SwapTable table) {
  PickShared& shared = shared_memory<PickShared>();
  for (uint32_t number = blockIdx.x; number < (table.joint ? 1 : table.count); number += gridDim.x) {
    const Segment& segment = table.segments[number];
    const Emitted emitted = {segment.emitted_at, segment.window, segment.counts};
    const Request request = request_of(table, number);
    const bool nothing = !request.active || numel_of(table, number) == 0;
    const bool done = nothing || (emitted.suffices(table, request.step, numel_of(table, number)) &&
                                  CandidateSwap(table, number, emitted, shared).run(request));
    if (threadIdx.x != 0) continue;
    table.segments[number].round = kNoRound;
    if (nothing) write_stats(table, number, {}, 0.0f, false);
    if (!done) start_rounds(table, number);
  }
}

// ---- all blocks, on the scores of the segments that are left

class Rounds {
 public:
  __device__ Rounds(const SwapTable& table, SelectShared& shared) : table_(table), shared_(shared) {}

  __device__ void scan(uint32_t tile, uint32_t layer, uint32_t number) {
    const SwapLayer& from = table_.layers[layer];
    switch (shared_.plan.stage) {
      case Stage::kThreshold:
        scan_for_threshold(from, tile, number);
        break;
      case Stage::kCuts:
        scan_for_cuts(from, tile, number);
        break;
      default:
        scan_to_apply(from, tile);
    }
  }

  __device__ void conclude(uint32_t number) {
    switch (shared_.plan.stage) {
      case Stage::kThreshold:
        conclude_threshold(number);
        break;
      case Stage::kCuts:
        conclude_cuts(number);
        break;
      default:
        finish(number);
    }
  }

 private:
  template <class Visit>  // visit(rank, kept, index)
  __device__ void each(const SwapLayer& layer, uint32_t tile, const Visit& visit) const {
    each_of_tile(layer.scores, layer.place, tile, [&](float score, uint32_t index) {
      const bool kept = layer.mask[index / 32] >> index % 32 & 1;
      visit(rank_of(score, layer.place.position + index), kept, index);
    });
  }

  __device__ uint32_t* histogram_of(uint32_t number, uint32_t problem) const {
    return table_.histograms + (number * kProblems + problem) * kBins;
  }

  __device__ void scan_for_threshold(const SwapLayer& layer, uint32_t tile, uint32_t number) {
    const Problem problem = shared_.plan.problems[0];
    uint32_t kept_here = 0;
    clear(shared_.histograms[0]);
    __syncthreads();
    each(layer, tile, [&](uint64_t rank, bool kept, uint32_t) {
      count_digit(shared_.histograms[0], problem, rank);
      kept_here += kept;
    });
    __syncthreads();
    add_histogram(histogram_of(number, 0), shared_.histograms[0]);
    if (!shared_.plan.first) return;
    kept_here = sum_up_to(kept_here, shared_.sums);
    if (threadIdx.x == blockDim.x - 1) atomicAdd(&table_.segments[number].tally.kept, kept_here);
  }

  __device__ void conclude_threshold(uint32_t number) {
    Plan& plan = shared_.plan;
    take_histogram(shared_.histograms[0], histogram_of(number, 0));
    if (threadIdx.x == 0 && plan.first) {
      plan.kept = __ldcg(&table_.segments[number].tally.kept);
      plan.target = request_of(table_, number).target(plan.kept);
      plan.problems[0].k = plan.target;
    }
    __syncthreads();
    find_bin(shared_.histograms[0], plan.problems[0].k, shared_);
    if (threadIdx.x != 0) return;
    narrow(plan.problems[0], shared_.bin, false);
    plan.first = plan.problems[0].decided;
    if (!plan.first) return;
    plan.stage = Stage::kCuts;
    plan.threshold_cut = plan.problems[0].cut();
    const bool bounds = table_.pairs == Pairs::kBest;
    for (uint32_t i = 0; i < kProblems; ++i) plan.problems[i] = {0, 0, 64, i >= kEnteringBound && !bounds};
  }

  __device__ void scan_for_cuts(const SwapLayer& layer, uint32_t tile, uint32_t number) {
    const Plan& plan = shared_.plan;
    const int64_t step = table_.control[0];
    uint64_t lowest = 0;
    for (uint32_t i = 0; i < kProblems; ++i) clear(shared_.histograms[i]);
    __syncthreads();
    each(layer, tile, [&](uint64_t rank, bool kept, uint32_t) {
      const bool inside = rank >= plan.threshold_cut;
      if (inside && ~rank > lowest) lowest = ~rank;
      if (inside == kept) return;
      const uint64_t priority = priority_of(table_, step, rank, !kept);
      for (uint32_t i = kept ? kLeaving : kEntering; i < kProblems; i += 2) {
        if (!plan.problems[i].decided) count_digit(shared_.histograms[i], plan.problems[i], priority);
      }
    });
    if (plan.first) {
      lowest = largest_of_block(lowest, shared_.largest);
      if (threadIdx.x == 0) atomic_max(&table_.segments[number].tally.lowest, lowest);
    }
    __syncthreads();
    for (uint32_t i = 0; i < kProblems; ++i) {
      if (!plan.problems[i].decided) add_histogram(histogram_of(number, i), shared_.histograms[i]);
    }
  }

  __device__ void conclude_cuts(uint32_t number) {
    Plan& plan = shared_.plan;
    if (plan.first) {
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < kBins; i += blockDim.x) {
        shared_.histograms[0][i] = __ldcg(histogram_of(number, kEntering) + i);
      }
      __syncthreads();
      find_bin(shared_.histograms[0], 1, shared_);
      if (threadIdx.x == 0) set_counts(number, shared_.total);
      __syncthreads();
    }
    bool open = false;
    for (uint32_t i = 0; i < kProblems; ++i) {
      if (plan.problems[i].decided) continue;
      take_histogram(shared_.histograms[0], histogram_of(number, i));
      find_bin(shared_.histograms[0], plan.problems[i].k, shared_);
      if (threadIdx.x == 0) decide(plan.problems[i]);
      __syncthreads();
      open |= !plan.problems[i].decided;
    }
    if (threadIdx.x != 0) return;
    plan.first = 0;
    if (!open) plan.stage = Stage::kApply;
  }

  // A problem that asks for none is decided once its histogram is empty again.
  __device__ void decide(Problem& problem) const {
    if (problem.k == 0) {
      problem.decided = true;
    } else {
      narrow(problem, shared_.bin, false);
    }
  }

  __device__ void set_counts(uint32_t number, uint32_t proposed) {
    Plan& plan = shared_.plan;
    const Request request = request_of(table_, number);
    plan.proposed = proposed;
    plan.entered = request.granted(proposed);
    plan.left = plan.entered + plan.kept - plan.target;
    plan.problems[kEntering].k = plan.entered;
    plan.problems[kLeaving].k = plan.left;
    const Bounds bounds(request, plan, proposed, proposed + plan.kept - plan.target);
    plan.problems[kEnteringBound].k = bounds.entering;
    plan.problems[kLeavingBound].k = bounds.leaving;
  }

  __device__ void scan_to_apply(const SwapLayer& layer, uint32_t tile) {
    const Plan& plan = shared_.plan;
    const int64_t step = table_.control[0];
    const uint64_t entering_cut = plan.problems[kEntering].cut(), leaving_cut = plan.problems[kLeaving].cut();
    each(layer, tile, [&](uint64_t rank, bool kept, uint32_t index) {
      if ((rank >= plan.threshold_cut) == kept || (kept ? plan.left : plan.entered) == 0) return;
      const uint64_t cut = kept ? leaving_cut : entering_cut;
      if (priority_of(table_, step, rank, !kept) >= cut) change(layer, index, !kept);
    });
  }

  __device__ void finish(uint32_t number) {
    __syncthreads();  // conclude() has read the stage in every thread
    if (threadIdx.x != 0) return;
    Plan& plan = shared_.plan;
    Segment& segment = table_.segments[number];
    const float threshold = score_at(table_, number, ~__ldcg(&segment.tally.lowest));
    const Problem &entering = plan.problems[kEnteringBound], &leaving = plan.problems[kLeavingBound];
    write_stats(table_, number, plan, threshold, true);
    arm(segment, threshold, entering.open < 64 ? entering.cut() : 0, leaving.open < 64 ? ~leaving.cut() : 0);
    plan.stage = Stage::kFinished;
  }

  const SwapTable& table_;
  SelectShared& shared_;
};

__global__ void __launch_bounds__(kScanThreads, 2) scan_kernel(const __grid_constant__ SwapTable table) {
  const uint64_t cold = table.header->counters.cold;
  if (cold == 0) return;
  SelectShared& shared = shared_memory<SelectShared>();
  if (threadIdx.x == 0) {
    shared.participants = static_cast<uint32_t>(cold >> 32);
    shared.tiles = static_cast<uint32_t>(cold);
  }
  for (uint32_t i = threadIdx.x; i < cold >> 32; i += blockDim.x)
    shared.participant[i] = table.header->cold[i];
  Rounds operation(table, shared);
  run_rounds(table, 2 * kRoundsOfProblem + 1, operation, shared);
}

}  // namespace

cudaError_t swap(const Launch& launch, const std::vector<SwapLayer>& layers, SwapTable table,
                 const Workspace& workspace) {
  const SwapTable whole = table;
  table.header = workspace.header();
  table.ranks = workspace.ranks();
  return for_each_part(launch, table, layers, kScanTile, [&](SwapTable& part, size_t first) {
    part.num_kept = whole.num_kept + 2 * first;
    part.stats = whole.stats + 5 * first;
    part.segments = workspace.segments() + first;
    part.histograms = workspace.histograms() + first * kProblems * kBins;
    const int64_t segments = part.joint ? 1 : part.count;
    const cudaError_t error = start(select_kernel, launch.stream, launch.blocks ? launch.blocks : segments,
                                    launch.threads_or(kSelectThreads), sizeof(PickShared), part);
    if (error != cudaSuccess || part.tiles == 0) return error;
    return start(scan_kernel, launch.stream, launch.blocks_for(part.tiles, 2),
                 launch.threads_or(kScanThreads), sizeof(SelectShared), part);
  });
}

}  // namespace jackpot
