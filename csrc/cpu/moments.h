// Partial sums of batch statistics: per chunk of rows (bn_act.h's grid) a pivot, sum(x - pivot) and sum((x - pivot)^2).
// Around something near the mean, chunks merged in float64 (Chan): E[x^2] - E[x]^2 loses everything at mean/std = 1e4,
// and a true second pass would read x once more. Taken in a pass of their own (bn_act.cpp), or by a
// convolution of the rows it has just written (conv_direct.h): the same sums in the same order.
#pragma once
#include "bn_act.h"

namespace rf {
namespace RF_ISA {

// One chunk's sums, [channels] each.
struct Moments {
  float *pivot, *sum, *square;
};

RF_INLINE Moments moments_of(float* partials, const Grid& grid, int64_t chunk) {
  float* at = partials + chunk * 3 * grid.padded;
  return {at, at + grid.padded, at + 2 * grid.padded};
}

template <int rows, class T, class Lanes>
RF_INLINE void add_rows(const T* x, int64_t stride, const Moments& m, int64_t c, Lanes lanes) {
  const Vec pivot = load(m.pivot + c);
  Vec sum = zero(), square = zero();
  RF_UNROLL for (int i = 0; i < rows; ++i) {
    const Vec d = load(x + i * stride + c, lanes) - pivot;
    sum = sum + d;
    square = fma(d, d, square);
  }
  store(m.sum + c, load(m.sum + c) + sum);
  store(m.square + c, load(m.square + c) + square);
}

// The mean of the first `rows` rows, a power of two, added as a tree: exact where they are equal, so that a
// constant channel has variance 0 however large it is.
template <int rows, class T, class Lanes>
RF_INLINE Vec mean_of(const T* x, int64_t stride, Lanes lanes) {
  if constexpr (rows == 1)
    return load(x, lanes);
  else
    return (mean_of<rows / 2>(x, stride, lanes) + mean_of<rows / 2>(x + rows / 2 * stride, stride, lanes)) *
           broadcast(0.5f);
}

// Something in the middle of a chunk's first rows. An outlier costs the others' digits, an infinity makes NaN of what
// torch has infinite: so the middle of three means.
template <class T, class Lanes>
RF_INLINE Vec pivot_of(const T* x, int64_t stride, int64_t size, Lanes lanes) {
  const Vec pivot = size >= 8   ? median(mean_of<2>(x, stride, lanes), mean_of<2>(x + 2 * stride, stride, lanes),
                                         mean_of<4>(x + 4 * stride, stride, lanes))
                    : size >= 3 ? median(load(x, lanes), load(x + stride, lanes), load(x + 2 * stride, lanes))
                                : load(x, lanes);
  return finite_or_zero(pivot);
}

// Begins a chunk of `size` rows at `row`, the first eight of which are there.
template <class T>
void start_moments(const T* row, int64_t stride, int64_t size, const Tile& t, const Moments& m) {
  for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
    store(m.pivot + c, pivot_of(row + c, stride, size, lanes));
    store(m.sum + c, zero());
    store(m.square + c, zero());
  });
}

// Adds a tile's rows. Tiles that begin at multiples of kGroupRows of their chunk add up as the whole chunk does.
template <class T>
void add_moments(const T* x, int64_t stride, const Tile& t, const Moments& m) {
  for_groups(t, size_t(stride) * sizeof(T), [&](int64_t at, auto rows) {
    for_columns(t.col_begin, t.col_end,
                [&](int64_t c, auto lanes) { add_rows<rows.value>(x + at * stride, stride, m, c, lanes); });
  });
}

}  // namespace RF_ISA
}  // namespace rf
