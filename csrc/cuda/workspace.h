// What steps leave for each other on the device, in one int64 tensor that starts as zeros: counters of the
// launch, a record and two candidate lists a segment, and histograms of the cold path. Nothing here can
// change a result: a swap checks that the lists suffice and scans the scores otherwise.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../window.h"

namespace jackpot {

constexpr uint32_t kDigit = 11;  // bits that one round of a selection decides
constexpr uint32_t kBins = 1u << kDigit;
constexpr uint32_t kProblems = 4;
constexpr uint32_t kMaxLayers = 256;  // of a launch

// A segment that takes part in the rounds over all scores, and the first of its tiles among theirs.
struct Participant {
  uint32_t segment, first_tile;
};

// All are 0 between two launches.
struct Counters {
  uint32_t not_finite, blocks_done;  // of the look at the gradients
  uint32_t ticket, left;             // of the rounds
  uint64_t cold;                     // segments and, in the lower half, tiles of them
};

struct Header {
  Counters counters;
  Participant cold[kMaxLayers];  // as many as are counted
};

struct Counts {
  uint32_t kept_out, pruned_out;  // candidates emitted
  uint32_t above, pruned_above;   // scores above the window, of all and of the pruned
  uint32_t kept;                  // mask bits set
};

// The search for the k-th largest of some distinct 64-bit values. It is among those that begin with `prefix`,
// the k-th of them; the last `open` bits are not known. Once it is decided, only the first k values reach the
// cut.
struct Problem {
  uint64_t prefix;
  uint32_t k, open;
  uint64_t decided;

  JACKPOT_HOST_DEVICE uint64_t cut() const { return open < 64 ? prefix << open : 0; }
};

enum class Stage : uint32_t { kThreshold, kCuts, kApply, kFinished };

// How far the rounds over all scores have come with a segment; written by one block at a time.
struct Plan {
  Stage stage;
  uint32_t first;  // round of its stage
  uint32_t kept, target, proposed, entered, left;
  uint64_t threshold_cut;       // the target set are the ranks that reach it
  Problem problems[kProblems];  // the threshold, or the cuts of entering and leaving and the bounds of both
};

// Written by all blocks of a round.
struct Tally {
  uint64_t lowest;  // rank of the target set, negated so that it starts as 0
  uint32_t kept, tiles_done;
};

struct Segment {
  int64_t emitted_at;  // the step whose candidates the lists hold, 0: none
  Window window;
  float threshold, predicted, half_width;
  uint32_t armed;  // the window rests on an earlier step's threshold; else nothing is emitted or counted
  Counts counts;
  uint32_t round;  // the one that may run now
  Plan plan;
  Tally tally;
};
static_assert(std::is_trivial_v<Segment> && sizeof(Segment) % 8 == 0 && sizeof(Header) % 8 == 0);

constexpr uint32_t kNoRound = 0xffffffffu;

class Workspace {
 public:
  // Of no segments: counters alone, for an update that emits no candidates.
  Workspace(int64_t* words, const std::vector<int64_t>& numel) : words_(words), count_(numel.size()) {
    size_ = lists_at();
    for (const int64_t n : numel) size_ += 2 * candidate_capacity(static_cast<uint32_t>(n));
  }

  int64_t size() const { return size_; }  // in int64 words
  uint32_t num_segments() const { return static_cast<uint32_t>(count_); }
  Header* header() const { return reinterpret_cast<Header*>(words_); }
  Segment* segments() const { return count_ ? reinterpret_cast<Segment*>(words_ + kHeader) : nullptr; }
  uint32_t* histograms() const { return reinterpret_cast<uint32_t*>(words_ + kHeader + count_ * kSegment); }
  uint64_t* ranks() const { return reinterpret_cast<uint64_t*>(words_ + lists_at()); }

 private:
  static constexpr int64_t kHeader = sizeof(Header) / 8, kSegment = sizeof(Segment) / 8;

  int64_t lists_at() const { return kHeader + count_ * (kSegment + kProblems * kBins / 2); }

  int64_t* words_;
  int64_t count_, size_;
};

}  // namespace jackpot
