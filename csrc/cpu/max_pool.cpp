// max_pool forward and backward on the CPU.
// Bytes: forward reads x once (overlapping windows hit the caches) and writes y and one byte of argmax an output;
// backward reads dy and argmax and writes dx once. An eight-bit index where torch keeps 64 bits.
// Backward gathers: each input pixel asks the few windows that cover it. No zeroed buffer, no atomics, one order.
#include "max_pool.h"

namespace rf {
namespace RF_ISA {

template <bool keep_index, class T>
static void forward_pixel(const PoolShape& s, const T* corner, Range taps_h, Range taps_w, T* y, uint8_t* argmax) {
  const int64_t step_h = s.dilation_h * s.W * s.C, step_w = s.dilation_w * s.C;
  for (int64_t c = 0; c < s.C; c += kLanes) {
    const int n = int(s.C - c < kLanes ? s.C - c : kLanes);
    const bool whole = n == kLanes;
    // Starts from the first tap, as torch does where every value is -inf.
    const T* start = corner + taps_h.begin * step_h + taps_w.begin * step_w + c;
    Vec best = whole ? load(start) : load_n(start, n);
    Index at = index(int(taps_h.begin * s.S + taps_w.begin));
    for (int64_t r = taps_h.begin; r < taps_h.end; ++r) {
      for (int64_t q = taps_w.begin; q < taps_w.end; ++q) {
        const T* p = corner + r * step_h + q * step_w + c;
        const Vec v = whole ? load(p) : load_n(p, n);
        if (keep_index)
          take(&best, &at, v, index(int(r * s.S + q)));
        else
          best = max_nan(best, v);
      }
    }
    if (whole) {
      store(y + c, best);
      if (keep_index) store(argmax + c, at);
    } else {
      store_n(y + c, best, n);
      if (keep_index) store_n(argmax + c, at, n);
    }
  }
}

template <class T, bool keep_index>
static void forward(const MaxPoolArgs& a) {
  const PoolShape& s = a.shape;
  parallel(a.threads, [&](const Team& team) {
    const Range rows = team.share(s.N * s.P);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t h = row % s.P * s.stride_h - s.pad_h;
      const Range taps_h = valid_taps(h, s.dilation_h, s.R, s.H);
      for (int64_t q = 0; q < s.Q; ++q) {
        const int64_t w = q * s.stride_w - s.pad_w, out = (row * s.Q + q) * s.C;
        const T* corner = static_cast<const T*>(a.x) + ((row / s.P * s.H + h) * s.W + w) * s.C;
        forward_pixel<keep_index>(s, corner, taps_h, valid_taps(w, s.dilation_w, s.S, s.W), static_cast<T*>(a.y) + out,
                                  keep_index ? a.argmax + out : nullptr);
      }
    }
  });
}

template <class T>
static void backward(const MaxPoolBackwardArgs& a) {
  const PoolShape& s = a.shape;
  parallel(a.threads, [&](const Team& team) {
    const Range share = team.share(s.N * s.H);
    Hit hits[kMostHits];
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t h = row % s.H, image = row / s.H * s.P * s.Q * s.C;
      const Range rows = covering(h, s.pad_h, s.stride_h, s.dilation_h, s.R, s.P);
      const T* dy = static_cast<const T*>(a.dy) + image;
      const uint8_t* argmax = a.argmax + image;
      for (int64_t w = 0; w < s.W; ++w) {
        const int count = find_hits(s, h, w, rows, hits);
        T* dx = static_cast<T*>(a.dx) + (row * s.W + w) * s.C;
        int64_t c = 0;
        for (; c + kLanes <= s.C; c += kLanes) {
          Vec sum = zero();
          for (int i = 0; i < count; ++i) {
            const int64_t at = hits[i].offset + c;
            sum = add_where(sum, load(dy + at), argmax + at, hits[i].place);
          }
          store(dx + c, sum);
        }
        if (c == s.C) continue;
        const int n = int(s.C - c);
        Vec sum = zero();
        for (int i = 0; i < count; ++i) {
          const int64_t at = hits[i].offset + c;
          sum = add_where_n(sum, load_n(dy + at, n), argmax + at, hits[i].place, n);
        }
        store_n(dx + c, sum, n);
      }
    }
  });
}

void max_pool_forward(const MaxPoolArgs& a) {
  const bool f32 = a.dtype == DType::f32;
  if (a.argmax)
    f32 ? forward<float, true>(a) : forward<bf16, true>(a);
  else
    f32 ? forward<float, false>(a) : forward<bf16, false>(a);
}

void max_pool_backward(const MaxPoolBackwardArgs& a) { a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a); }

}  // namespace RF_ISA
}  // namespace rf
