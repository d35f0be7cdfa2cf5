// The register tile of the weight gradients: up to kTileRows filters by one panel of input channels, summed over depth
// (pixels, or Winograd tiles). A step of depth is one broadcast a filter and two loads: 2 * rows * kPanel flops.
// Both operands are packed along depth, [step][kStripStride] and [step][kPanel], so that nothing strides.
// The sums join memory every `chain` steps: about the square root of the depth rounds least (32 steps always: 784
// additions in one chain at 56x56 and 6 % of the time).
#pragma once
#include "gemm.h"

namespace rf {
namespace RF_ISA {

constexpr int kStripStride = 16;  // words from step to step in a strip: a cache line of floats

// Filters cut into strips of even height: strip i is [first(i), first(i + 1)).
struct Strips {
  int64_t filters, count;
  explicit Strips(int64_t K) : filters(K), count(ceil_div(K, int64_t(kTileRows))) {}
  RF_INLINE int64_t first(int64_t i) const { return filters * i / count; }
  RF_INLINE int64_t height(int64_t i) const { return first(i + 1) - first(i); }
};

// sums[row][kPanel] (+)= a^T b over `depth` words; `fresh`: sums hold nothing yet.
template <int kRows, class Word>
void outer_tile(const Word* a, const Word* b, int64_t depth, int64_t chain, float* sums, bool fresh) {
  while (depth > 0) {
    Vec acc[kRows][2];
    RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
    const int64_t steps = smaller(depth, chain);
    for (int64_t i = 0; i < steps; ++i, a += kStripStride, b += kPanel) {
      const auto b0 = fetch(b), b1 = fetch(b + kLanes);
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto v = spread(a + r);
        acc[r][0] = multiply_add(v, b0, acc[r][0]);
        acc[r][1] = multiply_add(v, b1, acc[r][1]);
      }
    }
    depth -= steps;
    RF_UNROLL for (int r = 0; r < kRows; ++r) {
      RF_UNROLL for (int n = 0; n < 2; ++n) {
        float* t = sums + r * kPanel + n * kLanes;
        store(t, fresh ? acc[r][n] : load(t) + acc[r][n]);
      }
    }
    fresh = false;
  }
}

template <class Word>
struct OuterTiles {
  void (*at[kTileRows + 1])(const Word*, const Word*, int64_t, int64_t, float*, bool);
  template <int... I>
  static constexpr OuterTiles make(std::integer_sequence<int, I...>) {
    return {{nullptr, outer_tile<I + 1, Word>...}};
  }
};
template <class Word>
constexpr OuterTiles<Word> kOuterTiles = OuterTiles<Word>::make(std::make_integer_sequence<int, kTileRows>());

}  // namespace RF_ISA
}  // namespace rf
