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

// Candidates beyond this many are faster to find again by all blocks.
constexpr uint32_t kMostForOneBlock = 1u << 16;

// The problems of Stage::kCuts.
enum { kEntering, kLeaving, kEnteringBound, kLeavingBound };

// What the schedules and the person ask of a segment in this step.
struct Request {
  bool active;
  int64_t step;
  double rate, ramp;
  int64_t first, last;

  __device__ uint32_t target(uint32_t now) const {
    const int64_t wanted =
        last + static_cast<int64_t>(ceil(__dmul_rn(static_cast<double>(first - last), ramp)));
    return static_cast<uint32_t>(wanted < 1 ? 1 : wanted < now ? wanted : now);
  }
  __device__ uint32_t granted(uint32_t proposed) const {
    const double share = ceil(__dmul_rn(static_cast<double>(proposed), rate));
    return share < proposed ? static_cast<uint32_t>(share) : proposed;
  }
};

// A step outside the schedule swaps nothing, as one that was skipped.
__device__ Request request_of(const SwapTable& table, uint32_t number) {
  const int64_t step = table.control[0];
  if (table.control[2] || step < 1 || step > table.steps) return {};
  const double* const row = table.schedule + 2 * (step - 1);
  const int64_t* const num_kept = table.num_kept + 2 * number;
  return {true, step, row[0], row[1], num_kept[0], num_kept[1]};
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

// Where the next step's list of one class must reach: what leaves now three times over, and some more.
__device__ uint64_t bound_rank(uint32_t taken) { return 3 * uint64_t{taken} + 65; }

__device__ bool wants_bound(uint32_t taken, uint32_t count, uint32_t numel) {
  return count > candidate_capacity(numel) / 4 && bound_rank(taken) <= count;
}

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
  window.pruned_low = entering_bound ? score_of(entering_bound) + moved : window.low;
  window.kept_high = leaving_bound ? score_of(leaving_bound) + moved : window.high;
}

__device__ float score_at(const SwapTable& table, uint32_t number, uint64_t rank) {
  const SwapLayer& layer = layer_at(table, number, position_of(rank));
  return layer.scores[position_of(rank) - layer.place.position];
}

// ---- one block, on the candidates of a segment

constexpr uint32_t kListBatch = 4;

// The candidates of one class, as values of which the largest swap first.
struct List {
  const uint64_t* ranks;
  uint32_t count;
  uint64_t turned;  // bits in which a value differs from the rank

  // visit(value) for the thread's share, some of which are on their way at a time.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    for (uint32_t first = threadIdx.x; first < count; first += kListBatch * blockDim.x) {
      uint64_t batch[kListBatch];
#pragma unroll
      for (uint32_t i = 0; i < kListBatch; ++i) {
        const uint32_t at = first + i * blockDim.x;
        batch[i] = at < count ? ranks[at] : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < kListBatch; ++i) {
        if (first + i * blockDim.x < count) visit(batch[i] ^ turned);
      }
    }
  }
};

struct Lists {
  List entering, leaving;  // pruned and kept weights

  __device__ List of(uint32_t problem) const { return problem % 2 == kEntering ? entering : leaving; }
};

// What the lists hold around the threshold.
struct Borders {
  uint64_t threshold;          // rank of the last of the target set
  uint64_t entering, leaving;  // the largest value of either list

  __device__ uint64_t first_of(uint32_t problem) const {
    return problem % 2 == kEntering ? entering : leaving;
  }
};

// Finds the threshold among the candidates inside the window, and the number of those that want to enter;
// false if the window misses it.
__device__ bool find_threshold(const Lists& lists, const Segment& segment, Plan& plan, Borders& borders,
                               SelectShared& shared) {
  const uint64_t low = uint64_t{rank_key(segment.window.low)} << 32;
  const uint64_t high = uint64_t{rank_key(segment.window.high)} << 32 | 0xffffffffu;
  if (plan.target <= segment.counts.above) return false;
  const auto each_rank = [&](const auto& visit) {
    lists.entering.each(visit);
    lists.leaving.each([&](uint64_t value) { visit(~value); });
  };
  uint64_t cut = 0;
  if (!select(low, high, plan.target - segment.counts.above, each_rank, shared, cut)) return false;

  uint64_t entering = 0, leaving = 0, last = 0;  // that one negated
  uint32_t proposed = 0;
  lists.entering.each([&](uint64_t rank) {
    entering = entering < rank ? rank : entering;
    if (rank < cut || rank > high) return;
    last = last < ~rank ? ~rank : last;
    ++proposed;
  });
  lists.leaving.each([&](uint64_t value) {
    leaving = leaving < value ? value : leaving;
    if (~value >= cut && ~value <= high && last < value) last = value;
  });
  borders.threshold = ~largest_of_block(last, shared.largest);
  borders.entering = largest_of_block(entering, shared.largest);
  borders.leaving = largest_of_block(leaving, shared.largest);
  proposed = sum_up_to(proposed, shared.sums);
  if (threadIdx.x == blockDim.x - 1) shared.total = proposed;
  __syncthreads();
  plan.proposed = segment.counts.pruned_above + shared.total;
  return true;
}

// Finds the cuts of all that swaps, and where the next step's lists may end: a cut of 0 is the window's own
// end. False if a list is too short.
__device__ bool find_cuts(const Lists& lists, const Plan& plan, const Borders& borders, uint32_t numel,
                          SelectShared& shared) {
#pragma unroll 1
  for (uint32_t i = 0; i < kProblems; ++i) {
    const List list = lists.of(i);
    const uint32_t taken = i % 2 == kEntering ? plan.entered : plan.left;
    uint64_t low = i % 2 == kEntering ? borders.threshold : ~borders.threshold, cut = 0;
    uint32_t k = taken;
    if (i >= kEnteringBound) {
      low = 0;
      k = wants_bound(taken, list.count, numel) ? static_cast<uint32_t>(bound_rank(taken)) : 0;
    }
    const auto each = [&](const auto& visit) { list.each(visit); };
    if (k > 0 && !select(low, borders.first_of(i), k, each, shared, cut)) return false;
    if (threadIdx.x == 0) shared.cuts[i] = cut;
  }
  __syncthreads();
  return true;
}

// The lists hold every score in the window, every kept one up to `lowest_until` and every pruned one from
// `highest_from`, so whatever is chosen inside these bounds is what a scan of all scores would choose.
__device__ bool reach_far_enough(const Lists& lists, const Window& window, const Plan& plan,
                                 const SelectShared& shared) {
  const float highest_from =
      window.pruned_low <= window.high ? fminf(window.pruned_low, window.low) : window.pruned_low;
  const float lowest_until =
      window.kept_high >= window.low ? fmaxf(window.kept_high, window.high) : window.kept_high;
  const uint64_t from = uint64_t{rank_key(highest_from)} << 32;
  const uint64_t until = uint64_t{rank_key(lowest_until)} << 32 | 0xffffffffu;
  bool beyond = false;
#pragma unroll 1
  for (uint32_t i = kEntering; i <= kLeaving; ++i) {
    const uint64_t cut = shared.cuts[i], end = i == kEntering ? from : ~until;
    if ((i == kEntering ? plan.entered : plan.left) == 0 || cut >= end) continue;
    lists.of(i).each([&](uint64_t value) { beyond |= value >= cut && value < end; });
  }
  return !__syncthreads_or(beyond);
}

__device__ bool swap_candidates(const SwapTable& table, uint32_t number, const Request& request,
                                SelectShared& shared) {
  Segment& segment = table.segments[number];
  const Counts& counts = segment.counts;
  const uint32_t numel = numel_of(table, number), capacity = candidate_capacity(numel);
  if (segment.emitted_at != request.step || table.pairs != Pairs::kBest || counts.kept_out > capacity ||
      counts.pruned_out > capacity || counts.kept_out + counts.pruned_out > kMostForOneBlock) {
    return false;
  }
  const uint64_t* const ranks = table.ranks + table.layers[number].place.lists;
  const Lists lists = {{ranks + capacity, counts.pruned_out, 0}, {ranks, counts.kept_out, ~0ull}};
  Plan plan = {};
  Borders borders = {};
  plan.kept = counts.kept;
  plan.target = request.target(counts.kept);
  if (!find_threshold(lists, segment, plan, borders, shared)) return false;
  plan.entered = request.granted(plan.proposed);
  plan.left = plan.entered + plan.kept - plan.target;
  if (!find_cuts(lists, plan, borders, numel, shared)) return false;
  if (!reach_far_enough(lists, segment.window, plan, shared)) return false;

#pragma unroll 1
  for (uint32_t i = kEntering; i <= kLeaving; ++i) {
    const List list = lists.of(i);
    const uint64_t cut = shared.cuts[i];
    if ((i == kEntering ? plan.entered : plan.left) == 0) continue;
    list.each([&](uint64_t value) {
      if (value >= cut) swap_bit(table, number, value ^ list.turned, i == kEntering);
    });
  }
  if (threadIdx.x == 0) {
    const float score = score_at(table, number, borders.threshold);
    const uint64_t entering_bound = shared.cuts[kEnteringBound], leaving_bound = shared.cuts[kLeavingBound];
    write_stats(table, number, plan, score, false);
    arm(segment, score, entering_bound, leaving_bound ? ~leaving_bound : 0);
  }
  return true;
}

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
  SelectShared& shared = shared_memory<SelectShared>();
  for (uint32_t number = blockIdx.x; number < (table.joint ? 1 : table.count); number += gridDim.x) {
    const Request request = request_of(table, number);
    const bool nothing = !request.active || numel_of(table, number) == 0;
    const bool done = nothing || swap_candidates(table, number, request, shared);
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
        scan_to_apply(from, tile, number);
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
    const uint32_t numel = numel_of(table_, number);
    plan.proposed = proposed;
    plan.entered = request.granted(proposed);
    plan.left = plan.entered + plan.kept - plan.target;
    const uint32_t leaving = proposed + plan.kept - plan.target;
    plan.problems[kEntering].k = plan.entered;
    plan.problems[kLeaving].k = plan.left;
    if (wants_bound(plan.entered, proposed, numel)) {
      plan.problems[kEnteringBound].k = static_cast<uint32_t>(bound_rank(plan.entered));
    }
    if (wants_bound(plan.left, leaving, numel)) {
      plan.problems[kLeavingBound].k = static_cast<uint32_t>(bound_rank(plan.left));
    }
  }

  __device__ void scan_to_apply(const SwapLayer& layer, uint32_t tile, uint32_t) {
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
                                    launch.threads_or(kSelectThreads), sizeof(SelectShared), part);
    if (error != cudaSuccess || part.tiles == 0) return error;
    return start(scan_kernel, launch.stream, launch.blocks_for(part.tiles, 2),
                 launch.threads_or(kScanThreads), sizeof(SelectShared), part);
  });
}

}  // namespace jackpot
