// The k-th largest of distinct 64-bit values, eleven bits a round: histogram, then the bin that holds it. A
// block does the rounds alone over a list, or all blocks together over the scores of a segment.
#pragma once

#include "device.cuh"

namespace jackpot {

struct Bin {
  uint32_t bin, k, count;  // the k-th of `count` values in it
};

struct SelectShared {
  uint32_t histograms[kProblems][kBins];
  Plan plan;
  uint64_t lowest;  // negated, so that it starts as 0
  SumScratch sums;
  Bin bin;
  uint32_t total, ticket, flag, kept;
};

__device__ inline uint32_t digit_width(const Problem& problem) {
  return problem.open < kDigit ? problem.open : kDigit;
}

__device__ inline void count_digit(uint32_t* histogram, const Problem& problem, uint64_t value) {
  if (problem.open < 64 && value >> problem.open != problem.prefix) return;
  const uint32_t width = digit_width(problem);
  atomicAdd(&histogram[value >> (problem.open - width) & ((1u << width) - 1)], 1u);
}

__device__ inline void clear(uint32_t* histogram) {
  for (uint32_t i = threadIdx.x; i < kBins; i += blockDim.x) histogram[i] = 0;
}

// Leaves the bin that holds the k-th from the top in shared.bin, its count 0 if there are fewer than k, and
// the sum of all bins in shared.total. All threads must come here, and see the histogram.
__device__ inline void find_bin(const uint32_t* histogram, uint32_t k, SelectShared& shared) {
  const uint32_t each = kBins / blockDim.x, top = kBins - 1 - threadIdx.x * each;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < each; ++i) sum += histogram[top - i];
  const uint32_t end = sum_up_to(sum, shared.sums);
  uint32_t before = end - sum;
  if (threadIdx.x == blockDim.x - 1) {
    shared.total = end;
    if (k < 1 || k > end) shared.bin = {};
  }
  if (before < k && k <= end) {
    uint32_t bin = top;
    for (; before + histogram[bin] < k; --bin) before += histogram[bin];
    shared.bin = {bin, k - before, histogram[bin]};
  }
  __syncthreads();
}

// With `exact` the cut becomes the k-th value itself; else any that only the first k reach will do.
__device__ inline void narrow(Problem& problem, const Bin& bin, bool exact) {
  const uint32_t width = digit_width(problem);
  problem.prefix = problem.prefix << width | bin.bin;
  problem.k = bin.k;
  problem.open -= width;
  problem.decided = problem.open == 0 || (!exact && bin.k == bin.count);
}

// All values lie between low and high.
__device__ inline Problem problem_between(uint64_t low, uint64_t high, uint32_t k) {
  const uint32_t open = low < high ? 64 - __clzll(low ^ high) : 64;
  return {open < 64 ? high >> open : 0, k, open, false};
}

// Decides a problem in one block; false if there are fewer than k values. each(visit) calls visit(value) for
// the thread's share of them.
template <class Each>
__device__ bool select(Problem& problem, const Each& each, SelectShared& shared) {
  uint32_t* const histogram = shared.histograms[0];
  while (!problem.decided) {
    __syncthreads();
    clear(histogram);
    __syncthreads();
    each([&](uint64_t value) { count_digit(histogram, problem, value); });
    __syncthreads();
    find_bin(histogram, problem.k, shared);
    if (shared.bin.count == 0) return false;
    narrow(problem, shared.bin, false);
  }
  return true;
}

constexpr uint32_t kScanBatch = 16;

// visit(score, index) for the thread's share of the elements of a tile.
template <class Visit>
__device__ void each_of_tile(const float* scores, const Place& place, uint32_t tile, const Visit& visit) {
  const uint32_t begin = (tile - place.first_tile) * kScanTile;
  const uint32_t end = place.numel - begin < kScanTile ? place.numel : begin + kScanTile;
  for (uint32_t batch = begin; batch < end; batch += blockDim.x * kScanBatch) {
    float values[kScanBatch];
#pragma unroll
    for (uint32_t i = 0; i < kScanBatch; i += 4) {
      load4(values + i, scores, batch + i * blockDim.x + threadIdx.x * 4, end);
    }
#pragma unroll
    for (uint32_t i = 0; i < kScanBatch; ++i) {
      const uint32_t index = batch + (i / 4 * 4) * blockDim.x + threadIdx.x * 4 + i % 4;
      if (index < end) visit(values[i], index);
    }
  }
}

// Adds the block's histogram to the segment's.
__device__ inline void add_histogram(uint32_t* to, const uint32_t* from) {
  for (uint32_t i = threadIdx.x; i < kBins; i += blockDim.x) {
    if (from[i]) atomicAdd(&to[i], from[i]);
  }
}

// Takes the segment's histogram, which all blocks have added to, and leaves zeros.
__device__ inline void take_histogram(uint32_t* to, uint32_t* from) {
  for (uint32_t i = threadIdx.x; i < kBins; i += blockDim.x) {
    to[i] = __ldcg(from + i);
    from[i] = 0;
  }
  __syncthreads();
}

// Waits until a round may run and takes its plan; false if the segment needs it no more.
__device__ inline bool enter_round(const Segment& segment, uint32_t round, SelectShared& shared) {
  if (threadIdx.x == 0) {
    const volatile uint32_t* const open = &segment.round;
    while (*open < round) __nanosleep(100);
    shared.flag = *open == round;
    __threadfence();
  }
  __syncthreads();
  const bool runs = shared.flag;
  if (runs) copy_from_blocks(shared.plan, segment.plan);
  __syncthreads();
  return runs;
}

__device__ inline void open_next_round(Segment& segment, uint32_t round, const Plan& plan) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  segment.plan = plan;
  segment.tally.tiles_done = 0;
  __threadfence();
  *static_cast<volatile uint32_t*>(&segment.round) = plan.stage == Stage::kFinished ? kNoRound : round + 1;
}

// Rounds over the scores of all segments in one launch. Blocks take tiles in order, round after round, and
// wait only for tiles that were taken before theirs, so that a block waits for none that has not started: any
// number of blocks comes to the end, at once or one after the other. The last block of a segment's round
// draws its conclusion: operation.scan(tile, layer, segment) and operation.conclude(segment) see shared.plan.
template <class Table, class Operation>
__device__ void run_rounds(const Table& table, uint32_t rounds, Operation& operation, SelectShared& shared) {
  Header& header = *table.header;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) shared.ticket = atomicAdd(&header.ticket, 1u);
    __syncthreads();
    const uint32_t round = shared.ticket / table.tiles, tile = shared.ticket % table.tiles;
    if (round >= rounds) break;
    const uint32_t layer = layer_from<&Place::first_tile>(table.layers, table.count, tile);
    const uint32_t number = table.joint ? 0 : layer;
    Segment& segment = table.segments[number];
    if (!enter_round(segment, round, shared)) continue;
    operation.scan(tile, layer, number);
    const bool whole = table.joint || layer + 1 == table.count;
    const uint32_t tiles = (whole ? table.tiles : table.layers[layer + 1].place.first_tile) -
                           table.layers[number].place.first_tile;
    if (!is_last(&segment.tally.tiles_done, tiles, shared.flag)) continue;
    operation.conclude(number);
    open_next_round(segment, round, shared.plan);
  }
  if (is_last(&header.left, gridDim.x, shared.flag) && threadIdx.x == 0) header = {};
}

constexpr uint32_t kRoundsOfProblem = (64 + kDigit - 1) / kDigit;

}  // namespace jackpot
