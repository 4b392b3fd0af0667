// The k-th ranked value of each segment and its position.
#include "launch.h"
#include "select.cuh"

namespace jackpot {
namespace {

constexpr uint32_t kThreads = 512;

class Rounds {
 public:
  __device__ Rounds(const ThresholdTable& table, SelectShared& shared) : table_(table), shared_(shared) {}

  // The workspace starts as zeros: that is the first round, with all yet to be set.
  __device__ void scan(uint32_t tile, uint32_t layer, uint32_t number) {
    Problem& problem = shared_.plan.problems[0];
    const auto& from = table_.layers[layer];
    if (threadIdx.x == 0 && problem.open == 0) {
      problem = {0, static_cast<uint32_t>(table_.num_kept[number]), 64, false};
    }
    clear(shared_.histograms[0]);
    __syncthreads();
    each_of_tile(from.scores, from.place, tile, [&](float score, uint32_t index) {
      count_digit(shared_.histograms[0], problem, rank_of(score, from.place.position + index));
    });
    __syncthreads();
    add_histogram(histogram_of(number), shared_.histograms[0]);
  }

  __device__ void conclude(uint32_t number) {
    Problem& problem = shared_.plan.problems[0];
    take_histogram(shared_.histograms[0], histogram_of(number));
    find_bin(shared_.histograms[0], problem.k, shared_);
    if (threadIdx.x != 0) return;
    narrow(problem, shared_.bin, true);
    if (!problem.decided) return;
    const uint32_t position = position_of(problem.cut());
    const auto& layer =
        table_.layers[table_.joint ? layer_from<&Place::position>(table_.layers, table_.count, position)
                                   : number];
    table_.value[number] = layer.scores[position - layer.place.position];
    table_.index[number] = position;
    shared_.plan.stage = Stage::kFinished;
  }

 private:
  __device__ uint32_t* histogram_of(uint32_t number) const {
    return table_.histograms + number * kProblems * kBins;
  }

  const ThresholdTable& table_;
  SelectShared& shared_;
};

__global__ void __launch_bounds__(kThreads, 2)
    threshold_kernel(const __grid_constant__ ThresholdTable table) {
  SelectShared& shared = shared_memory<SelectShared>();
  const uint32_t segments = table.joint ? 1 : table.count;
  if (threadIdx.x == 0) {
    shared.participants = segments;
    shared.tiles = table.tiles;
  }
  for (uint32_t i = threadIdx.x; i < segments; i += blockDim.x) {
    shared.participant[i] = {i, table.layers[i].place.first_tile};
  }
  Rounds operation(table, shared);
  run_rounds(table, kRoundsOfProblem, operation, shared);
}

}  // namespace

cudaError_t threshold(const Launch& launch, const std::vector<ThresholdLayer>& layers, ThresholdTable table,
                      const Workspace& workspace) {
  const ThresholdTable whole = table;
  table.header = workspace.header();
  return for_each_part(launch, table, layers, kScanTile, [&](ThresholdTable& part, size_t first) {
    part.num_kept = whole.num_kept + first;
    part.value = whole.value + first;
    part.index = whole.index + first;
    part.segments = workspace.segments() + first;
    part.histograms = workspace.histograms() + first * kProblems * kBins;
    return start(threshold_kernel, launch.stream, launch.blocks_for(part.tiles, 2),
                 launch.threads_or(kThreads), sizeof(SelectShared), part);
  });
}

}  // namespace jackpot
