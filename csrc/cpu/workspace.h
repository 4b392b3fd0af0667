// What a score update leaves for the swap that follows: one record and two candidate lists a segment, in one
// int64 tensor. Nothing here can change a result: a swap checks that the lists suffice and scans the scores
// otherwise.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "candidates.h"
#include "segments.h"

namespace jackpot {

struct SegmentRecord {
  int64_t emitted_at;  // the step whose candidates the lists hold, 0: none
  int64_t armed;       // the window rests on an earlier step's threshold; else nothing is emitted or counted
  Counts counts;
  Window window;
  float threshold, predicted, half_width;
};
static_assert(std::is_trivial_v<SegmentRecord>);

constexpr int64_t kRecordWords = sizeof(SegmentRecord) / sizeof(int64_t);

inline int64_t workspace_words(const std::vector<int64_t>& numel) {
  int64_t words = 0;
  for (const int64_t n : numel) words += kRecordWords + 2 * candidate_capacity(n);
  return words;
}

struct Workspace {
  std::vector<SegmentRecord*> records;  // [S]
  std::vector<Candidates> candidates;   // [S]

  Workspace(const Segments& segments, const Tensor& tensor) {
    require_cpu(tensor, torch::headeronly::ScalarType::Long, "workspace");
    STD_TORCH_CHECK(tensor.numel() == workspace_words(segments.numel),
                    "workspace must be made for these layers");
    int64_t* words = static_cast<int64_t*>(tensor.data_ptr());
    for (const int64_t numel : segments.numel) {
      const int64_t capacity = candidate_capacity(numel);
      records.push_back(reinterpret_cast<SegmentRecord*>(words));
      uint64_t* const ranks = reinterpret_cast<uint64_t*>(words + kRecordWords);
      candidates.push_back({&records.back()->counts, {ranks, capacity}, {ranks + capacity, capacity}});
      words += kRecordWords + 2 * capacity;
    }
  }
};

inline std::optional<Workspace> make_workspace(const Segments& segments,
                                               const std::optional<Tensor>& tensor) {
  std::optional<Workspace> workspace;
  if (tensor) workspace.emplace(segments, *tensor);
  return workspace;
}

}  // namespace jackpot
