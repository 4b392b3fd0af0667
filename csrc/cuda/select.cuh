// The k-th largest of distinct 64-bit values, eleven bits a round: histogram, then the bin that holds it. All
// blocks do the rounds together over the scores of a segment.
#pragma once

#include "device.cuh"

namespace jackpot {

struct Bin {
  uint32_t bin, k, count;  // the k-th of `count` values in it
};

struct SelectShared {
  uint32_t histograms[kProblems][kBins];
  Plan plan;
  SumScratch sums;
  MaxScratch largest;
  Bin bin;
  uint32_t total, ticket, flag;
  uint32_t participants, tiles;  // of the rounds
  Participant participant[kMaxLayers];
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
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < kBins; i += blockDim.x) histogram[i] = 0;
}

// Leaves the bin that holds the k-th from the top in shared.bin, its count 0 if there are fewer than k, and
// the sum of all bins in shared.total. All threads must come here, and see the histogram.
__device__ inline void find_bin(const uint32_t* histogram, uint32_t k, SelectShared& shared) {
  const uint32_t each = kBins / blockDim.x, top = kBins - 1 - threadIdx.x * each;
  uint32_t sum = 0;
#pragma unroll 1
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

__device__ inline const Participant& participant_of(uint32_t tile, const SelectShared& shared) {
  const auto first_tile = [&](uint32_t i) { return shared.participant[i].first_tile; };
  return shared.participant[last_from(shared.participants, tile, first_tile)];
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

// The tiles of a segment, its first tile among all tiles of the table.
template <class Table>
__device__ uint32_t tiles_of(const Table& table, uint32_t number) {
  const bool whole = table.joint || number + 1 == table.count;
  return (whole ? table.tiles : table.layers[number + 1].place.first_tile) -
         table.layers[number].place.first_tile;
}

// Rounds over the scores of shared.participant in one launch. Blocks take tiles in order, round after round,
// and wait only for tiles that were taken before theirs, so that a block waits for none that has not started:
// any number of blocks comes to the end, at once or one after the other. The last block of a segment's round
// draws its conclusion: operation.scan(tile, layer, segment) and operation.conclude(segment) see shared.plan.
template <class Table, class Operation>
__device__ void run_rounds(const Table& table, uint32_t rounds, Operation& operation, SelectShared& shared) {
  Counters& counters = table.header->counters;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) shared.ticket = atomicAdd(&counters.ticket, 1u);
    __syncthreads();
    const uint32_t round = shared.ticket / shared.tiles, at = shared.ticket % shared.tiles;
    if (round >= rounds) break;
    const auto& [number, first_tile] = participant_of(at, shared);
    const uint32_t tile = table.layers[number].place.first_tile + at - first_tile;
    const uint32_t layer =
        table.joint ? layer_from<&Place::first_tile>(table.layers, table.count, tile) : number;
    Segment& segment = table.segments[number];
    if (!enter_round(segment, round, shared)) continue;
    operation.scan(tile, layer, number);
    if (!is_last(&segment.tally.tiles_done, tiles_of(table, number), shared.flag)) continue;
    operation.conclude(number);
    open_next_round(segment, round, shared.plan);
  }
  if (is_last(&counters.left, gridDim.x, shared.flag) && threadIdx.x == 0) counters = {};
}

constexpr uint32_t kRoundsOfProblem = (64 + kDigit - 1) / kDigit;

}  // namespace jackpot
