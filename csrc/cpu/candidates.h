// Candidates of one segment: ranks of kept and of pruned weights that tiles append to, in any order. A list
// that overflows only counts; whoever reads it sees that it is not complete and takes another way.
#pragma once

#include <cstdint>
#include <cstring>

#include "tile.h"

namespace jackpot {

struct CandidateList {
  uint64_t* ranks;
  int64_t capacity;

  void append(int64_t& count, const uint64_t* tile_ranks, int64_t tile_count) const {
    if (tile_count == 0) return;
    const int64_t at = __atomic_fetch_add(&count, tile_count, __ATOMIC_RELAXED);
    if (at + tile_count <= capacity) memcpy(ranks + at, tile_ranks, tile_count * sizeof *ranks);
  }
};

struct Candidates {
  Counts* counts;
  CandidateList kept, pruned;

  bool complete() const { return counts->kept_out <= kept.capacity && counts->pruned_out <= pruned.capacity; }
  void append(const Tile& tile, const Counts& tile_counts) const {
    kept.append(counts->kept_out, tile.kept, tile_counts.kept_out);
    pruned.append(counts->pruned_out, tile.pruned, tile_counts.pruned_out);
    __atomic_fetch_add(&counts->above, tile_counts.above, __ATOMIC_RELAXED);
    __atomic_fetch_add(&counts->pruned_above, tile_counts.pruned_above, __ATOMIC_RELAXED);
    __atomic_fetch_add(&counts->kept, tile_counts.kept, __ATOMIC_RELAXED);
  }
};

}  // namespace jackpot
