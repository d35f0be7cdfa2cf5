// Winograd's F(r, 3) along one line: y = A^T [ (G g) * (B^T d) ], from interpolation points (Toom-Cook, transposed).
//   Line4         4 outputs of stride 1 from 6 inputs and products: 0, +-3/4, +-3/2, infinity, half the rounding error
//                 of 0, +-1, +-2 at the same cost.
//   Line2         2 outputs of stride 1 from 4: 0, +-1, infinity.
//   LineStrided4  4 outputs of stride 2 from 9 inputs and products, for 12: the even inputs meet two taps, F(4, 2) on
//                 +-1/2, +-3/2, infinity; the odd ones meet one and are their own products. No more rounding error than
//                 a direct sum: the polynomials have one degree less.
// The last tile of a line may have fewer outputs: F(r, 3) on some of the points costs as many products as it needs. Its
// filters are those points' filters of the whole F(4, 3); what their normalisation owes to the absent points,
// prod (p - p_absent), is made good in B^T. The portable build has whole tiles only: it need not be fast, and g++ takes
// a minute over the others. A sub-line has r outputs: 4 and 3 have both pairs of points, 2 and 1 the first; 4 and 2
// have infinity.
#pragma once
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

// B^T of two pairs of points and infinity, on the inputs L::kFirst, + kStride, + 2 kStride, ...
template <class L>
struct TwoPairs {
  template <class In>
  static RF_INLINE Vec at(const In& d, int i) {
    return d(L::kFirst + L::kStride * i);
  }
  template <int r, class In>
  static RF_INLINE void pair(int which, const In& d, Vec& plus, Vec& minus) {
    constexpr float a2 = L::kA * L::kA, b2 = L::kB * L::kB;
    const float p = which ? L::kB : L::kA, other = which ? -a2 : -b2;
    Vec even, odd;
    if constexpr (r <= 2) {
      even = at(d, 1) * broadcast(a2 - b2), odd = at(d, 0) * broadcast(a2 - b2);
    } else {
      even = fma(at(d, 1), broadcast(other), at(d, 3)), odd = fma(at(d, 0), broadcast(other), at(d, 2));
    }
    plus = fma(odd, broadcast(p), even);
    minus = fma(odd, broadcast(-p), even);
  }
  template <int r, class In>
  static RF_INLINE Vec infinity(const In& d) {
    constexpr float a2 = L::kA * L::kA, b2 = L::kB * L::kB;
    if constexpr (r == 2) {
      return fma(at(d, 0), broadcast(-a2), at(d, 2));
    } else {
      return fma(at(d, 0), broadcast(a2 * b2), fma(at(d, 2), broadcast(-(a2 + b2)), at(d, 4)));
    }
  }
  template <int r, class In>
  static RF_INLINE Vec zero_point(const In& d) {
    constexpr float a2 = L::kA * L::kA, b2 = L::kB * L::kB;
    if constexpr (r <= 2) {
      return fma(at(d, -1), broadcast(a2 * b2), at(d, 1) * broadcast(-b2));
    } else {
      return fma(at(d, -1), broadcast(a2 * b2), fma(at(d, 1), broadcast(-(a2 + b2)), at(d, 3)));
    }
  }
};

// kZero and kPairs: how many points 0 and +-p; kOdd: inputs that are products themselves; kInfinity: its place.
struct Line4 : TwoPairs<Line4> {
  static constexpr int kOut = 4, kIn = 6, kStride = 1, kFirst = 1, kZero = 1, kPairs = 2, kOdd = 0, kInfinity = 5;
  static constexpr bool kTails = kLanes > 4;
  static constexpr float kA = 0.75f, kB = 1.5f;
};
struct LineStrided4 : TwoPairs<LineStrided4> {
  static constexpr int kOut = 4, kIn = 9, kStride = 2, kFirst = 0, kZero = 0, kPairs = 2, kOdd = 4, kInfinity = 4;
  static constexpr bool kTails = kLanes > 4;
  static constexpr float kA = 0.5f, kB = 1.5f;
};
struct Line2 {
  static constexpr int kOut = 2, kIn = 4, kStride = 1, kZero = 1, kPairs = 1, kOdd = 0, kInfinity = 3;
  static constexpr bool kTails = false;
  static constexpr float kA = 1, kB = 0;
  template <int r, class In>
  static RF_INLINE Vec zero_point(const In& d) {
    return d(2) - d(0);
  }
  template <int r, class In>
  static RF_INLINE Vec infinity(const In& d) {
    return d(3) - d(1);
  }
  template <int r, class In>
  static RF_INLINE void pair(int, const In& d, Vec& plus, Vec& minus) {
    const Vec even = d(2), odd = d(1);
    plus = even + odd;
    minus = even - odd;
  }
};

// What r outputs of a line take.
template <class L, int r>
struct SubLine {
  static constexpr int kPairs = r <= 2 ? 1 : L::kPairs;
  static constexpr bool kInfinity = r % 2 == 0;
  static constexpr int kOdd = L::kOdd ? r : 0;
  static constexpr int kIn = (r - 1) * L::kStride + 3;  // inputs, and as many points
};
template <class L>
RF_INLINE bool has_point(int outputs, int point) {
  if (point == L::kInfinity) return outputs % 2 == 0;
  if (point > L::kInfinity) return point - L::kInfinity - 1 < outputs;
  return point < L::kZero + 2 * (outputs <= 2 ? 1 : L::kPairs);
}

// Calls make(point, value) for every point of the line whose inputs are d(0), d(1), ...
template <class L, int r, class In, class Make>
RF_INLINE void line_points(const In& d, const Make& make) {
  using Sub = SubLine<L, r>;
  if constexpr (L::kZero) make(0, L::template zero_point<r>(d));
  RF_UNROLL for (int p = 0; p < Sub::kPairs; ++p) {
    Vec plus, minus;
    L::template pair<r>(p, d, plus, minus);
    make(L::kZero + 2 * p, plus);
    make(L::kZero + 2 * p + 1, minus);
  }
  if constexpr (Sub::kInfinity) make(L::kInfinity, L::template infinity<r>(d));
  RF_UNROLL for (int i = 0; i < Sub::kOdd; ++i) make(L::kInfinity + 1 + i, d(2 * i + 1));
}

// A^T m: r outputs y from the points m(0), m(1), ...
template <class L, int r, class In>
RF_INLINE void line_outputs(const In& m, Vec* y) {
  using Sub = SubLine<L, r>;
  constexpr float a = L::kA, b = L::kB;
  const Vec sum_a = m(L::kZero) + m(L::kZero + 1), difference_a = m(L::kZero) - m(L::kZero + 1);
  if constexpr (Sub::kPairs == 1) {
    y[0] = sum_a;
    if constexpr (r > 1) y[1] = difference_a * broadcast(a);
  } else {
    const Vec sum_b = m(L::kZero + 2) + m(L::kZero + 3), difference_b = m(L::kZero + 2) - m(L::kZero + 3);
    y[0] = sum_a + sum_b;
    y[1] = fma(difference_b, broadcast(b), difference_a * broadcast(a));
    y[2] = fma(sum_b, broadcast(b * b), sum_a * broadcast(a * a));
    if constexpr (r > 3) y[3] = fma(difference_b, broadcast(b * b * b), difference_a * broadcast(a * a * a));
  }
  if constexpr (L::kZero) y[0] = m(0) + y[0];
  if constexpr (Sub::kInfinity) y[r - 1] = y[r - 1] + m(L::kInfinity);
  RF_UNROLL for (int i = 0; i < Sub::kOdd; ++i) y[i] = y[i] + m(L::kInfinity + 1 + i);
}

// G, in double.
template <class L>
inline void line_filter_matrix(double (*g)[3]) {
  constexpr int kFinite = L::kZero + 2 * L::kPairs;
  const double pairs[4] = {L::kA, -L::kA, L::kB, -L::kB};
  const auto point = [&](int i) { return i < L::kZero ? 0.0 : pairs[i - L::kZero]; };
  for (int i = 0; i < kFinite; ++i) {
    double product = 1;
    for (int j = 0; j < kFinite; ++j) product *= j == i ? 1 : point(i) - point(j);
    g[i][0] = 1 / product, g[i][1] = L::kOdd ? 0 : point(i) / product;
    g[i][2] = (L::kOdd ? point(i) : point(i) * point(i)) / product;
  }
  g[L::kInfinity][0] = g[L::kInfinity][1] = 0, g[L::kInfinity][2] = 1;
  for (int i = L::kInfinity + 1; i < L::kIn; ++i) g[i][0] = g[i][2] = 0, g[i][1] = 1;
}

// One dimension cut into tiles: whole ones, then perhaps one of `tail` outputs (0: none). A tail of one output is
// computed as two: 9, 13, 17 pixels are rare, and every kind of tail is code.
template <class L>
struct LineTiles {
  int64_t whole;
  int tail;
  explicit LineTiles(int64_t outputs) {
    whole = L::kTails ? outputs / L::kOut : ceil_div(outputs, int64_t(L::kOut));
    const int64_t rest = outputs - whole * L::kOut;
    tail = rest <= 0 ? 0 : int(larger(rest, int64_t(2)));
  }
  int64_t count() const { return whole + (tail > 0); }
};

}  // namespace RF_ISA
}  // namespace rf
