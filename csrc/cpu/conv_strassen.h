// The filters of "strassen" (conv_strassen.cpp), packed: seven matrices of half the depth by half the columns each.
#pragma once
#include "conv_pack_strided.h"

namespace rf {
namespace RF_ISA {

constexpr int kProducts = 7;  // of the quarters of two matrices

struct StrassenPlan {
  int64_t pixels, pairs_per_image, pairs;  // pairs of neighbouring pixels of one image, the last perhaps of one
  int64_t half, chunks, panels;            // input channels of a half, chunks of those; panels of half the filters
  explicit StrassenPlan(const ConvShape& s)
      : pixels(s.P * s.Q),
        pairs_per_image((pixels + 1) / 2),
        pairs(s.N * pairs_per_image),
        half(s.C / 2),
        chunks(half / kChunk<float>),
        panels(s.K / (2 * kPanel)) {}
  int64_t panel_floats() const { return half * kPanel; }  // of one product
  // The first row (pixel) of a pair.
  RF_INLINE int64_t row(int64_t pair) const { return pair / pairs_per_image * pixels + pair % pairs_per_image * 2; }
};

namespace {

// packed: [panel][product][channel of a half][kPanel]. filters: of any strides; fold: [K] multiplied into them, or
// null.
void strassen_pack_panels(const PackStridedArgs& a, const float* fold, const Team& team) {
  const StrassenPlan p(a.shape);
  team.each(p.panels, [&](int64_t panel) {
    alignas(64) float b[2][2][kDepth * kPanel];  // [half of the channels][half of the filters]
    float* const out = static_cast<float*>(a.packed) + panel * kProducts * p.panel_floats();
    for (int64_t c = 0; c < p.half; c += kDepth) {
      const int depth = int(smaller(int64_t(kDepth), p.half - c));
      for (int d = 0; d < 2; ++d)
        for (int k = 0; k < 2; ++k) {
          const int64_t from = panel + k * p.panels;
          Source{a}.read(from, d * p.half + c, depth, 0, 0, b[d][k]);
          for (int64_t i = 0; fold && i < depth * kPanel; ++i) b[d][k][i] *= fold[from * kPanel + i % kPanel];
        }
      for (int64_t i = 0; i < depth * kPanel; i += kLanes) {
        const Vec b11 = load(b[0][0] + i), b12 = load(b[0][1] + i), b21 = load(b[1][0] + i), b22 = load(b[1][1] + i);
        const Vec made[kProducts] = {b11 - b22, b11, b12 + b22, b21 + b11, b22, b11 + b12, b21 + b22};
        RF_UNROLL for (int m = 0; m < kProducts; ++m) store(out + m * p.panel_floats() + c * kPanel + i, made[m]);
      }
    }
  });
}

}  // namespace

}  // namespace RF_ISA
}  // namespace rf
