// Included by one translation unit per instruction set, after its Vec: sixteen float32 lanes whose
// comparisons give sixteen bits. Only intrinsics and plain functions may be used here: an inline function of
// the standard library compiled for AVX-512 could be the copy the linker keeps for every machine.
namespace jackpot {
namespace {

constexpr int kLanes = 16;

bool all_finite(const float* values, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

inline void emit(uint32_t lanes, const float* scores, uint32_t position, uint64_t* out, int64_t& count) {
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    out[count++] = rank_of(scores[lane], position + lane);
  }
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
    for (; i + kLanes <= tile_.count; i += kLanes) {
      const float* grads = kUpdate ? tile_.grads + i : nullptr;
      lanes(tile_.scores + i, tile_.momenta + i, grads, i, 0xffffu);
    }
    if (i < tile_.count) rest(i);
    return counts_;
  }

 private:
  // The last, incomplete group goes through copies, so that no lane touches memory past the end.
  void rest(int64_t i) {
    const int64_t left = tile_.count - i;
    float scores[kLanes] = {}, momenta[kLanes] = {}, grads[kLanes] = {};
    __builtin_memcpy(scores, tile_.scores + i, left * sizeof(float));
    if (kUpdate) {
      __builtin_memcpy(momenta, tile_.momenta + i, left * sizeof(float));
      __builtin_memcpy(grads, tile_.grads + i, left * sizeof(float));
    }
    lanes(scores, momenta, grads, i, (1u << left) - 1);
    if (kUpdate) {
      __builtin_memcpy(tile_.scores + i, scores, left * sizeof(float));
      __builtin_memcpy(tile_.momenta + i, momenta, left * sizeof(float));
    }
  }

  inline void lanes(float* scores, float* momenta, const float* grads, int64_t i, uint32_t valid) {
    Vec s = Vec::load(scores);
    if (kUpdate) {
      const Vec g = fma(weight_decay_, s, Vec::load(grads) * inv_scale_);
      const Vec m = fma(momentum_, Vec::load(momenta), g);
      const Vec direction = tile_.nesterov ? fma(momentum_, m, g) : m;
      s = fma(minus_lr_, direction, s);
      m.store(momenta);
      s.store(scores);
    }
    if (kEmit) candidates(s, scores, i, valid);
  }

  inline void candidates(Vec s, const float* scores, int64_t i, uint32_t valid) {
    const uint32_t bits = tile_.mask ? tile_.mask[i / 32] >> (i % 32) : 0;
    const uint32_t kept = bits & valid, pruned = ~bits & valid;
    const uint32_t up_to_high = s <= high_;  // false for NaN, which ranks greatest
    const uint32_t window = up_to_high & (s >= low_);
    const uint32_t kept_out = kept & (window | ~(s > kept_high_));
    const uint32_t pruned_out = pruned & (window | ~(s < pruned_low_));
    counts_.above += __builtin_popcount(~up_to_high & valid);
    counts_.pruned_above += __builtin_popcount(~up_to_high & pruned);
    counts_.kept += __builtin_popcount(kept);
    if (kept_out | pruned_out) {
      emit(kept_out, scores, tile_.position + i, tile_.kept, counts_.kept_out);
      emit(pruned_out, scores, tile_.position + i, tile_.pruned, counts_.pruned_out);
    }
  }

  const Tile& tile_;
  const Vec minus_lr_, momentum_, weight_decay_, inv_scale_, low_, high_, kept_high_, pruned_low_;
  Counts counts_ = {};
};

Counts run(const Tile& tile) {
  if (!tile.grads) return TileRun<false, true>(tile).run();
  return tile.kept ? TileRun<true, true>(tile).run() : TileRun<true, false>(tile).run();
}

}  // namespace
}  // namespace jackpot
