// Winograd's 3x3 convolution of one tile: Y = A^T [ sum_c (G g G^T) * (B^T d B) ] A, a line (winograd_lines.h) of kind
// H for the rows by one of kind W for the columns. Of the direct multiplications, 4x4 take 0.25, 4x2 0.33, 2x2 0.44;
// with stride 2, 4x4 take 0.56. Tried and lost: keeping the whole 6x6 tile between the two passes of the input
// transform. It spills, and a 512-bit store costs two cycles; reading a column again for every pair of points costs
// one.
#pragma once
#include "winograd_lines.h"

namespace rf {
namespace RF_ISA {

// Transforms channels [0, channels) of one tile of h by w outputs. at: its input pixels, W::kIn to a row, each a run of
// channels. Point (i, j) of a channel lands at out + (i * W::kPoints + j) * point_stride, chunks of channels
// chunk_stride apart.
template <class H, int h, class W, int w, class T, class Element>
__attribute__((noinline)) void input_tile(const T* const* at, Range channels, int64_t real, int chunk, Element* out,
                                          int64_t chunk_stride, int64_t point_stride) {
  using Rows = SubLine<H, h>;
  constexpr int kW = SubLine<W, w>::kIn;
  for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
    Element* to = out + c / chunk * chunk_stride + c % chunk;
    const int n = int(smaller(larger(real - c, int64_t(0)), int64_t(kLanes)));
    const auto transform = [&](auto get) __attribute__((always_inline)) {
      const auto finish = [&](const Vec* line, int i) __attribute__((always_inline)) {
        line_points<W, w>([&](int j) __attribute__((always_inline)) { return line[j]; },
                          [&](int j, Vec v)
                              __attribute__((always_inline)) { store(to + (i * W::kPoints + j) * point_stride, v); });
      };
      const auto column = [&](int j) __attribute__((always_inline)) {
        return [&get, j](int i) __attribute__((always_inline)) { return get(i, j); };
      };
      Vec first[kW], second[kW];
      if constexpr (H::kZero) {
        RF_UNROLL for (int j = 0; j < kW; ++j) first[j] = H::template zero_point<h>(column(j));
        finish(first, 0);
      }
      RF_UNROLL for (int p = 0; p < Rows::kPairs; ++p) {
        RF_UNROLL for (int j = 0; j < kW; ++j) H::template pair<h>(p, column(j), first[j], second[j]);
        finish(first, H::kZero + 2 * p);
        finish(second, H::kZero + 2 * p + 1);
      }
      if constexpr (Rows::kInfinity) {
        RF_UNROLL for (int j = 0; j < kW; ++j) first[j] = H::template infinity<h>(column(j));
        finish(first, H::kInfinity);
      }
      RF_UNROLL for (int i = 0; i < Rows::kOdd; ++i) {
        RF_UNROLL for (int j = 0; j < kW; ++j) first[j] = get(odd_input<H>(i), j);
        finish(first, H::kInfinity + 1 + i);
      }
    };
    if (n == kLanes) {
      transform([&](int i, int j) __attribute__((always_inline)) { return load(at[i * W::kIn + j] + c); });
    } else {
      transform([&](int i, int j)
                    __attribute__((always_inline)) { return load_n(at[i * W::kIn + j] + (n ? c : 0), n); });
    }
  }
}

// A^T m A with the epilogue, for `cols` channels of one tile; `high` x `wide` of its pixels exist.
template <class T>
struct OutputTile {
  T* y;
  const T* residual;
  int64_t row_stride, pixel_stride;
  int high, wide, cols;
  bool relu;
};

template <class H, int h, class W, int w, class T>
__attribute__((noinline)) void output_tile(const float* sums, int64_t point_stride, Vec scale, Vec shift,
                                           const OutputTile<T>& o) {
  constexpr int kHigh = h * H::kSpan, kWide = w * W::kSpan;
  Vec half[kHigh][W::kPoints], y[kHigh][kWide];
  const auto column = [&](int j) __attribute__((always_inline)) {
    Vec column[kHigh];
    line_outputs<H, h>(
        [&](int i) __attribute__((always_inline)) { return load(sums + (i * W::kPoints + j) * point_stride); }, column);
    RF_UNROLL for (int i = 0; i < kHigh; ++i) half[i][j] = column[i];
  };
  using Cols = SubLine<W, w>;
  RF_UNROLL for (int j = 0; j < W::kZero + 2 * Cols::kPairs; ++j) column(j);
  if constexpr (Cols::kInfinity) column(W::kInfinity);
  RF_UNROLL for (int j = 0; j < Cols::kOdd; ++j) column(W::kInfinity + 1 + j);
  RF_UNROLL for (int i = 0; i < kHigh; ++i) {
    line_outputs<W, w>([&](int j) __attribute__((always_inline)) { return half[i][j]; }, y[i]);
    RF_UNROLL for (int j = 0; j < kWide; ++j) y[i][j] = fma(y[i][j], scale, shift);
  }
  if (o.high >= kHigh && o.wide >= kWide && o.cols >= kLanes) {
    RF_UNROLL for (int i = 0; i < kHigh; ++i) {
      RF_UNROLL for (int j = 0; j < kWide; ++j) {
        const int64_t at = i * o.row_stride + j * o.pixel_stride;
        if (o.residual) y[i][j] = y[i][j] + load(o.residual + at);
        if (o.relu) y[i][j] = relu(y[i][j]);
        store(o.y + at, y[i][j]);
      }
    }
    return;
  }
  const int n = smaller(o.cols, kLanes);
  RF_UNROLL for (int i = 0; i < kHigh; ++i) {
    if (i >= o.high) break;
    RF_UNROLL for (int j = 0; j < kWide; ++j) {
      if (j >= o.wide) break;
      const int64_t at = i * o.row_stride + j * o.pixel_stride;
      if (o.residual) y[i][j] = y[i][j] + load_n(o.residual + at, n);
      if (o.relu) y[i][j] = relu(y[i][j]);
      store_n(o.y + at, y[i][j], n);
    }
  }
}

// The two transforms of tiles of h by w outputs, both known only when the convolution is: whole, 3 or 2.
template <class T, class Element>
struct TileTransforms {
  void (*input)(const T* const*, Range, int64_t, int, Element*, int64_t, int64_t) = nullptr;
  void (*output)(const float*, int64_t, Vec, Vec, const OutputTile<T>&) = nullptr;
};

template <class H, class W, class T, class Element>
TileTransforms<T, Element> tile_transforms(int h, int w) {
  TileTransforms<T, Element> found;
  const auto both = [&](auto rows, auto cols) {
    constexpr int kH = decltype(rows)::value, kW = decltype(cols)::value;
    if (h == kH && w == kW) found = {input_tile<H, kH, W, kW, T, Element>, output_tile<H, kH, W, kW, T>};
  };
  const auto each_width = [&](auto rows) {
    both(rows, std::integral_constant<int, W::kOut>());
    if constexpr (W::kTails) both(rows, std::integral_constant<int, 3>()), both(rows, std::integral_constant<int, 2>());
  };
  each_width(std::integral_constant<int, H::kOut>());
  if constexpr (H::kTails) each_width(std::integral_constant<int, 3>()), each_width(std::integral_constant<int, 2>());
  return found;
}

// Compiled once, in winograd.cpp, winograd_bf16.cpp and dgrad_winograd.cpp.
template <class T, class Word>
using TransformsOf = TileTransforms<T, typename WordOf<Word>::Element>;
#define RF_TRANSFORMS(H, W, T, Word) TransformsOf<T, Word> tile_transforms<H, W, T, WordOf<Word>::Element>(int, int)
extern template RF_TRANSFORMS(Line4, Line4, float, float);
extern template RF_TRANSFORMS(Line2, Line2, float, float);
extern template RF_TRANSFORMS(LineStrided4, LineStrided4, float, float);
extern template RF_TRANSFORMS(Line4, Line2, bf16, Bf16Word);
extern template RF_TRANSFORMS(Line2, Line2, bf16, Bf16Word);
extern template RF_TRANSFORMS(LineStrided4, LineStrided4, bf16, Bf16Word);
extern template RF_TRANSFORMS(LineTransposed4, LineTransposed4, float, float);

}  // namespace RF_ISA
}  // namespace rf
