// Included by one translation unit per instruction set, after its Vec, sixteen float32 lanes whose
// comparisons give sixteen bits, its Tally of them, and its ways from 32 bools to a word and back. Only
// intrinsics and plain functions may be used here: an inline function of the standard library compiled for
// AVX-512 could be the copy the linker keeps for every machine.
namespace jackpot {
namespace {

constexpr int kLanes = 16;
constexpr int kGroup = 64;  // elements whose comparisons fill one word

// How far ahead of its work a pass asks for memory: a page, for the processor's own look-ahead stops at the
// end of one. On an Intel Xeon that saved a threshold a tenth to a third. As memory that is not needed again,
// which Intel fetches past its larger caches, it made the update of 20 million weights take 25 ms, not 9.
constexpr int kAhead = 1024;

bool all_finite(const float* values, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

void count_from(const float* values, int64_t count, const float* pivots, int64_t* counts) {
  Vec pivot[kPivots];
  Tally below[kPivots];
  for (int j = 0; j < kPivots; ++j) {
    pivot[j] = Vec::splat(pivots[j]);
    below[j] = Tally::zero();
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(values + i + kAhead);
    const Vec v = Vec::load(values + i);
    for (int j = 0; j < kPivots; ++j) below[j].add_less(v, pivot[j]);
  }
  for (int j = 0; j < kPivots; ++j) counts[j] = count - below[j].total();
  for (; i < count; ++i) {
    for (int j = 0; j < kPivots; ++j) counts[j] -= values[i] < pivots[j];
  }
}

// The ranks of the chosen elements of one group, appended to `out`, which has room for four more. Most groups
// give one or two: writing four without asking costs less than a branch that is guessed wrong.
inline void emit(uint64_t chosen, const float* scores, uint32_t position, uint64_t* out, int64_t& count) {
  const auto rank = [&](int lane) { return rank_of(scores[lane], position + lane); };
  const int64_t found = __builtin_popcountll(chosen);
  uint64_t* const end = out + count;
  for (int k = 0; k < 4; ++k, chosen &= chosen - 1) end[k] = rank(chosen ? __builtin_ctzll(chosen) : 0);
  for (int64_t k = 4; k < found; ++k, chosen &= chosen - 1) end[k] = rank(__builtin_ctzll(chosen));
  count += found;
}

int64_t collect(const float* values, int64_t count, uint32_t position, float low, float high, uint64_t* ranks,
                int64_t& above) {
  const Vec lowest = Vec::splat(low), highest = Vec::splat(high);
  int64_t found = 0;
  const auto group = [&](const float* scores, int64_t i, uint64_t valid) {
    uint64_t up_to_high = 0, from_low = 0;
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      __builtin_prefetch(scores + lane + kAhead);
      const Vec v = Vec::load(scores + lane);
      up_to_high |= static_cast<uint64_t>(v <= highest) << lane;
      from_low |= static_cast<uint64_t>(v >= lowest) << lane;
    }
    above += __builtin_popcountll(~up_to_high & valid);
    const uint64_t inside = up_to_high & from_low & valid;
    if (inside) emit(inside, scores, position + static_cast<uint32_t>(i), ranks, found);
  };
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) group(values + i, i, ~0ull);
  if (i == count) return found;
  float rest[kGroup] = {};
  __builtin_memcpy(rest, values + i, (count - i) * sizeof(float));
  group(rest, i, (1ull << (count - i)) - 1);
  return found;
}

template <bool kUpdate, bool kEmit>
class TileRun {
 public:
  explicit TileRun(const Tile& tile)
      : tile_(tile),
        minus_lr_(Vec::splat(-tile.lr)),
        momentum_(Vec::splat(tile.momentum)),
        weight_decay_(Vec::splat(tile.weight_decay)),
        inv_scale_(Vec::splat(tile.inv_scale)),
        low_(Vec::splat(tile.window.low)),
        high_(Vec::splat(tile.window.high)),
        kept_high_(Vec::splat(tile.window.kept_high)),
        pruned_low_(Vec::splat(tile.window.pruned_low)) {}

  Counts run() {
    int64_t i = 0;
    for (; i + kGroup <= tile_.count; i += kGroup) {
      group(tile_.scores + i, tile_.momenta + i, kUpdate ? tile_.grads + i : nullptr, i, ~0ull);
    }
    if (i < tile_.count) rest(i);
    return counts_;
  }

 private:
  // The last, incomplete group goes through copies, so that no lane touches memory past the end.
  void rest(int64_t i) {
    const int64_t left = tile_.count - i;
    float scores[kGroup] = {}, momenta[kGroup] = {}, grads[kGroup] = {};
    __builtin_memcpy(scores, tile_.scores + i, left * sizeof(float));
    if (kUpdate) {
      __builtin_memcpy(momenta, tile_.momenta + i, left * sizeof(float));
      __builtin_memcpy(grads, tile_.grads + i, left * sizeof(float));
    }
    group(scores, momenta, grads, i, (1ull << left) - 1);
    if (kUpdate) {
      __builtin_memcpy(tile_.scores + i, scores, left * sizeof(float));
      __builtin_memcpy(tile_.momenta + i, momenta, left * sizeof(float));
    }
  }

  inline void group(float* scores, float* momenta, const float* grads, int64_t i, uint64_t valid) {
    uint64_t up_to_high = 0, kept_range = 0, pruned_range = 0;
    if (kUpdate) {
      for (int lane = kAhead; lane < kAhead + kGroup; lane += kLanes) {
        __builtin_prefetch(scores + lane);
        __builtin_prefetch(momenta + lane);
        __builtin_prefetch(grads + lane);
      }
    }
    for (int lane = 0; lane < kGroup; lane += kLanes) {
      Vec s = Vec::load(scores + lane);
      if (kUpdate) {
        const Vec g = fma(weight_decay_, s, Vec::load(grads + lane) * inv_scale_);
        const Vec m = fma(momentum_, Vec::load(momenta + lane), g);
        s = fma(minus_lr_, tile_.nesterov ? fma(momentum_, m, g) : m, s);
        m.store(momenta + lane);
        s.store(scores + lane);
      }
      if (!kEmit) continue;
      const uint64_t up = s <= high_;  // false for NaN, which ranks greatest
      const uint64_t window = up & (s >= low_);
      up_to_high |= up << lane;
      kept_range |= (window | (~(s > kept_high_) & 0xffffu)) << lane;
      pruned_range |= (window | (~(s < pruned_low_) & 0xffffu)) << lane;
    }
    if (kEmit) candidates(scores, i, valid, up_to_high, kept_range, pruned_range);
  }

  inline void candidates(const float* scores, int64_t i, uint64_t valid, uint64_t up_to_high,
                         uint64_t kept_range, uint64_t pruned_range) {
    const uint64_t bits = mask_bits(i);
    const uint64_t kept = bits & valid, pruned = ~bits & valid;
    const uint64_t kept_out = kept & kept_range, pruned_out = pruned & pruned_range;
    counts_.above += __builtin_popcountll(~up_to_high & valid);
    counts_.pruned_above += __builtin_popcountll(~up_to_high & pruned);
    counts_.kept += __builtin_popcountll(kept);
    if (kept_out) emit(kept_out, scores, tile_.position + i, tile_.kept, counts_.kept_out);
    if (pruned_out) emit(pruned_out, scores, tile_.position + i, tile_.pruned, counts_.pruned_out);
  }

  inline uint64_t mask_bits(int64_t i) const {
    if (!tile_.mask) return 0;
    uint64_t bits = tile_.mask[i / 32];
    if (i + 32 < tile_.count) bits |= static_cast<uint64_t>(tile_.mask[i / 32 + 1]) << 32;
    return bits;
  }

  const Tile tile_;
  const Vec minus_lr_, momentum_, weight_decay_, inv_scale_, low_, high_, kept_high_, pruned_low_;
  Counts counts_ = {};
};

void pack(const uint8_t* bools, int64_t words, uint32_t* out) {
  for (int64_t i = 0; i < words; ++i) out[i] = word_of(bools + 32 * i);
}

void unpack(const uint32_t* in, int64_t words, uint8_t* bools) {
  for (int64_t i = 0; i < words; ++i) put_word(in[i], bools + 32 * i);
}

Counts run(const Tile& tile) {
  if (!tile.grads) return TileRun<false, true>(tile).run();
  return tile.kept ? TileRun<true, true>(tile).run() : TileRun<true, false>(tile).run();
}

}  // namespace
}  // namespace jackpot
