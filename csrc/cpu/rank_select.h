// The k-th ranked element of each of many segments, exactly.
#pragma once

#include <cstdint>
#include <vector>

#include "segments.h"

namespace jackpot {

// ranks[i] becomes the ks[i]-th rank (1 = the highest) of segment which[i].
void rank_select(const Segments& segments, const std::vector<int64_t>& which, const std::vector<int64_t>& ks,
                 std::vector<uint64_t>& ranks);

}  // namespace jackpot
