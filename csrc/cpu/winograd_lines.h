// Winograd's F(r, 3) along one line: y = A^T [ (G g) * (B^T d) ], from interpolation points (Toom-Cook, transposed).
//   Line4         4 outputs of stride 1 from 6 inputs and products: 0, +-3/4, +-3/2, infinity, half the rounding error
//                 of 0, +-1, +-2 at the same cost.
//   Line2         2 outputs of stride 1 from 4: 0, +-1, infinity.
//   LineStrided4  4 outputs of stride 2 from 9 inputs and products, for 12: the even inputs meet two taps, F(4, 2) on
//                 +-1/2, +-3/2, infinity; the odd ones meet one and are their own products. No more rounding error than
//                 a direct sum: the polynomials have one degree less.
//   LineTransposed4  the data gradient of stride 2: 8 of dx from 5 gradients and 9 products, for 12. Of two neighbours
//                 one meets the middle tap, the other the outer two: F(4, 2) on the points of LineStrided4.
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

// kOut outputs, kSpan pixels each, from kIn inputs, kStride an output; one output meets kReach inputs. kZero and
// kPairs: how many points 0 and +-p; kOdd: inputs that are products themselves; kInfinity: its place among kPoints.
struct Line4 : TwoPairs<Line4> {
  static constexpr int kOut = 4, kSpan = 1, kIn = 6, kStride = 1, kReach = 3, kFirst = 1;
  static constexpr int kPoints = 6, kZero = 1, kPairs = 2, kOdd = 0, kInfinity = 5;
  static constexpr bool kTails = kLanes > 4;
  static constexpr float kA = 0.75f, kB = 1.5f;
};
struct LineStrided4 : TwoPairs<LineStrided4> {
  static constexpr int kOut = 4, kSpan = 1, kIn = 9, kStride = 2, kReach = 3, kFirst = 0;
  static constexpr int kPoints = 9, kZero = 0, kPairs = 2, kOdd = 4, kInfinity = 4;
  static constexpr bool kTails = kLanes > 4;
  static constexpr float kA = 0.5f, kB = 1.5f;
};
struct LineTransposed4 : TwoPairs<LineTransposed4> {
  static constexpr int kOut = 4, kSpan = 2, kIn = 5, kStride = 1, kReach = 2, kFirst = 0;
  static constexpr int kPoints = 9, kZero = 0, kPairs = 2, kOdd = 4, kInfinity = 4;
  static constexpr bool kTails = kLanes > 4;
  static constexpr float kA = 0.5f, kB = 1.5f;
};
struct Line2 {
  static constexpr int kOut = 2, kSpan = 1, kIn = 4, kStride = 1, kReach = 3;
  static constexpr int kPoints = 4, kZero = 1, kPairs = 1, kOdd = 0, kInfinity = 3;
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
  static constexpr int kIn = (r - 1) * L::kStride + L::kReach;  // inputs
};
template <class L>
RF_INLINE bool has_point(int outputs, int point) {
  if (point == L::kInfinity) return outputs % 2 == 0;
  if (point > L::kInfinity) return point - L::kInfinity - 1 < outputs;
  return point < L::kZero + 2 * (outputs <= 2 ? 1 : L::kPairs);
}

// The input that is the product of point kInfinity + 1 + i.
template <class L>
constexpr int odd_input(int i) {
  return L::kReach == 3 ? 2 * i + 1 : i;
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
  RF_UNROLL for (int i = 0; i < Sub::kOdd; ++i) make(L::kInfinity + 1 + i, d(odd_input<L>(i)));
}

// A^T m: r outputs, kSpan pixels each, from the points m(0), m(1), ...
template <class L, int r, class In>
RF_INLINE void line_outputs(const In& m, Vec* out) {
  using Sub = SubLine<L, r>;
  Vec y[r];
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
  RF_UNROLL for (int i = 0; i < r; ++i) {
    if constexpr (L::kSpan == 2) {
      out[2 * i] = m(L::kInfinity + 1 + i);
      out[2 * i + 1] = y[i];
    } else {
      out[i] = Sub::kOdd ? y[i] + m(L::kInfinity + 1 + i) : y[i];
    }
  }
}

// A d: the points of r gradients d(0), d(1), ..., as the weight gradient wants them; calls make(point, value).
template <class L, int r, class In, class Make>
RF_INLINE void line_gradients(const In& d, const Make& make) {
  using Sub = SubLine<L, r>;
  if constexpr (L::kZero) make(0, d(0));
  RF_UNROLL for (int p = 0; p < Sub::kPairs; ++p) {
    const float at = p ? L::kB : L::kA;
    Vec even = d(0), odd = zero();
    if constexpr (r > 1) odd = d(1);
    if constexpr (r > 2) even = fma(d(2), broadcast(at * at), even);
    if constexpr (r > 3) odd = fma(d(3), broadcast(at * at), odd);
    make(L::kZero + 2 * p, fma(odd, broadcast(at), even));
    make(L::kZero + 2 * p + 1, fma(odd, broadcast(-at), even));
  }
  if constexpr (Sub::kInfinity) make(L::kInfinity, d(r - 1));
  RF_UNROLL for (int i = 0; i < Sub::kOdd; ++i) make(L::kInfinity + 1 + i, d(i));
}

// G^T m: three taps from the points m(0), m(1), ...
template <class L, class In>
RF_INLINE void line_taps(const In& m, Vec* taps) {
  constexpr int kA = L::kZero, kB = L::kZero + 2;
  constexpr float a = L::kA, b = L::kB, a2 = a * a, b2 = b * b;
  const Vec sum_a = m(kA) + m(kA + 1), sum_b = m(kB) + m(kB + 1), difference_a = m(kA) - m(kA + 1),
            difference_b = m(kB) - m(kB + 1);
  if constexpr (L::kOdd) {
    constexpr float na = 1 / (2 * (a2 - b2)), nb = 1 / (2 * (b2 - a2));
    taps[0] = fma(difference_a, broadcast(na / a), difference_b * broadcast(nb / b));
    taps[1] = zero();
    RF_UNROLL for (int i = L::kInfinity + 1; i < L::kPoints; ++i) taps[1] = taps[1] + m(i);
    taps[2] = fma(sum_a, broadcast(na), fma(sum_b, broadcast(nb), m(L::kInfinity)));
  } else {
    constexpr float n0 = 1 / (a2 * b2), na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));
    taps[0] = fma(m(0), broadcast(n0), fma(sum_a, broadcast(na), sum_b * broadcast(nb)));
    taps[1] = fma(difference_b, broadcast(nb * b), difference_a * broadcast(na * a));
    taps[2] = fma(sum_b, broadcast(nb * b2), fma(sum_a, broadcast(na * a2), m(L::kInfinity)));
  }
}

// G, in double.
template <class L>
inline void line_filter_matrix(double (*g)[3]) {
  constexpr int kFinite = L::kZero + 2 * L::kPairs;
  constexpr int first = L::kSpan == 2 ? 2 : 0, last = 2 - first;  // gradients meet the taps in reverse
  const double pairs[4] = {L::kA, -L::kA, L::kB, -L::kB};
  const auto point = [&](int i) { return i < L::kZero ? 0.0 : pairs[i - L::kZero]; };
  for (int i = 0; i < kFinite; ++i) {
    double product = 1;
    for (int j = 0; j < kFinite; ++j) product *= j == i ? 1 : point(i) - point(j);
    g[i][first] = 1 / product, g[i][1] = L::kOdd ? 0 : point(i) / product;
    g[i][last] = (L::kOdd ? point(i) : point(i) * point(i)) / product;
  }
  g[L::kInfinity][first] = g[L::kInfinity][1] = 0, g[L::kInfinity][last] = 1;
  for (int i = L::kInfinity + 1; i < L::kPoints; ++i) g[i][0] = g[i][2] = 0, g[i][1] = 1;
}

// The filters of a line's points: those of odd inputs all have the middle tap.
template <class L>
constexpr int kFilterPoints = L::kOdd ? L::kInfinity + 2 : L::kPoints;
template <class H, class W>
constexpr int kFilters = kFilterPoints<H> * kFilterPoints<W>;
// Which of those a point of the tile meets.
template <class H, class W>
RF_INLINE int filter_of(int point) {
  return smaller(point / W::kPoints, kFilterPoints<H> - 1) * kFilterPoints<W> +
         smaller(point % W::kPoints, kFilterPoints<W> - 1);
}

// Eight lanes of G's arithmetic.
typedef double Doubles __attribute__((vector_size(64)));

// Calls make(filter, value) with G's products of taps tap(0), tap(1), tap(2): what line_filter_matrix gives in the
// order of the taps, to the bit. Of the points +p and -p one product has the other sign, and zeros are left out.
template <class L, class In, class Make>
RF_INLINE void line_filters(const double (&g)[L::kPoints][3], const In& tap, const Make& make) {
  constexpr int first = L::kSpan == 2 ? 2 : 0, last = 2 - first;
  if constexpr (L::kZero) make(0, tap(first) * g[0][first]);
  RF_UNROLL for (int p = 0; p < L::kPairs; ++p) {
    const int i = L::kZero + 2 * p;
    const Doubles outer = tap(first) * g[i][first], far = tap(last) * g[i][last];
    if constexpr (L::kOdd) {
      make(i, far + outer);
      make(i + 1, far - outer);
    } else {
      const Doubles middle = tap(1) * g[i][1];
      make(i, outer + middle + far);
      make(i + 1, outer - middle + far);
    }
  }
  make(L::kInfinity, tap(last));
  if constexpr (L::kOdd) make(L::kInfinity + 1, tap(1));
}

// One dimension cut into tiles: whole ones, then perhaps one of `tail` outputs (0: none). A tail of one output is
// computed as two: 9, 13, 17 pixels are rare, and every kind of tail is code.
template <class L>
struct LineTiles {
  int64_t whole;
  int tail;
  explicit LineTiles(int64_t pixels) {
    const int64_t outputs = ceil_div(pixels, int64_t(L::kSpan));
    whole = L::kTails ? outputs / L::kOut : ceil_div(outputs, int64_t(L::kOut));
    const int64_t rest = outputs - whole * L::kOut;
    tail = rest <= 0 ? 0 : int(larger(rest, int64_t(2)));
  }
  int64_t count() const { return whole + (tail > 0); }
};

// Outputs of an image cut by both: the whole tiles, those at the right edge, at the bottom, and the one in the corner.
template <class H, class W>
struct TileKinds {
  struct Kind {
    int h, w;            // outputs
    int64_t rows, cols;  // tiles of an image
    int64_t p, q;        // the first pixel of the first of them
  };
  Kind kinds[4];
  int64_t images, tiles = 0;
  bool mixed = false;  // tiles of more than one size

  TileKinds(int64_t n, int64_t P, int64_t Q) : images(n) {
    const LineTiles<H> rows(P);
    const LineTiles<W> cols(Q);
    tiles = n * rows.count() * cols.count();
    for (int k = 0; k < 4; ++k) {
      const bool bottom = k / 2, right = k % 2;
      kinds[k] = {bottom ? rows.tail : H::kOut,
                  right ? cols.tail : W::kOut,
                  bottom ? int64_t(rows.tail > 0) : rows.whole,
                  right ? int64_t(cols.tail > 0) : cols.whole,
                  bottom ? rows.whole * H::kOut * H::kSpan : 0,
                  right ? cols.whole * W::kOut * W::kSpan : 0};
      mixed = mixed || (count(k) > 0 && count(k) < tiles);
    }
  }
  int64_t count(int kind) const { return images * kinds[kind].rows * kinds[kind].cols; }
  bool has(int kind, int point) const {
    return has_point<H>(kinds[kind].h, point / W::kPoints) && has_point<W>(kinds[kind].w, point % W::kPoints);
  }
  struct Place {
    int64_t n, p, q;  // image, and the tile's first pixel
  };
  Place place(int kind, int64_t tile) const {
    const Kind& k = kinds[kind];
    const int64_t per_image = k.rows * k.cols, at = tile % per_image;
    return {tile / per_image, k.p + at / k.cols * H::kOut * H::kSpan, k.q + at % k.cols * W::kOut * W::kSpan};
  }
};

}  // namespace RF_ISA
}  // namespace rf
