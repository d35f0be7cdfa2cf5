// max_pool forward and backward on the CPU.
// Bytes: forward reads x once (overlapping windows hit the caches) and writes y and one byte of argmax an output;
// backward reads dy and argmax and writes dx once. An eight-bit index where torch keeps 64 bits.
// Backward gathers: each input pixel asks the few windows that cover it. No zeroed buffer, no atomics, one order.
#include "../max_pool.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

// kLanes window indices, their update and their bytes in memory.
#if defined(__AVX512F__)
struct Index {
  __m512i v;
};
RF_INLINE Index index(int i) { return {_mm512_set1_epi32(i)}; }
// Takes the candidate where it is larger or NaN.
RF_INLINE void take(Vec* best, Index* at, Vec v, Index i) {
  const __mmask16 wins = _mm512_cmp_ps_mask(v.v, best->v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  best->v = _mm512_mask_mov_ps(best->v, wins, v.v);
  at->v = _mm512_mask_mov_epi32(at->v, wins, i.v);
}
RF_INLINE void store(uint8_t* p, Index i) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(i.v)); }
RF_INLINE void store_n(uint8_t* p, Index i, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(i.v)); }
// sum + dy where argmax is i.
RF_INLINE Vec add_where(Vec sum, Vec dy, const uint8_t* argmax, int i) {
  const __mmask16 hit = _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i*)argmax), _mm_set1_epi8(char(i)));
  return {_mm512_mask_add_ps(sum.v, hit, sum.v, dy.v)};
}
RF_INLINE Vec add_where_n(Vec sum, Vec dy, const uint8_t* argmax, int i, int n) {
  const __mmask16 hit = _mm_mask_cmpeq_epi8_mask(first(n), _mm_maskz_loadu_epi8(first(n), argmax), _mm_set1_epi8(char(i)));
  return {_mm512_mask_add_ps(sum.v, hit, sum.v, dy.v)};
}
#else
struct Index {
  int32_t v[kLanes];
};
#if defined(__AVX2__)
RF_INLINE __m256i lanes(const Index& i) { return _mm256_loadu_si256((const __m256i*)i.v); }
RF_INLINE void take(Vec* best, Index* at, Vec v, const Index& i) {
  const __m256 wins = _mm256_or_ps(_mm256_cmp_ps(v.v, best->v, _CMP_GT_OQ), _mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
  best->v = _mm256_blendv_ps(best->v, v.v, wins);
  _mm256_storeu_si256((__m256i*)at->v, _mm256_blendv_epi8(lanes(*at), lanes(i), _mm256_castps_si256(wins)));
}
RF_INLINE Vec add_where(Vec sum, Vec dy, const uint8_t* argmax, int i) {
  const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)argmax));
  const __m256 hit = _mm256_castsi256_ps(_mm256_cmpeq_epi32(at, _mm256_set1_epi32(i)));
  return {_mm256_blendv_ps(sum.v, _mm256_add_ps(sum.v, dy.v), hit)};
}
#else
RF_INLINE void take(Vec* best, Index* at, const Vec& v, const Index& i) {
  for (int j = 0; j < kLanes; ++j) {
    const bool wins = v.v[j] > best->v[j] || v.v[j] != v.v[j];
    best->v[j] = wins ? v.v[j] : best->v[j];
    at->v[j] = wins ? i.v[j] : at->v[j];
  }
}
RF_INLINE Vec add_where(Vec sum, const Vec& dy, const uint8_t* argmax, int i) {
  for (int j = 0; j < kLanes; ++j) sum.v[j] = argmax[j] == i ? sum.v[j] + dy.v[j] : sum.v[j];
  return sum;
}
#endif
RF_INLINE Index index(int i) {
  Index out;
  for (int j = 0; j < kLanes; ++j) out.v[j] = i;
  return out;
}
RF_INLINE void store_n(uint8_t* p, const Index& i, int n) {
  for (int j = 0; j < n; ++j) p[j] = uint8_t(i.v[j]);
}
RF_INLINE void store(uint8_t* p, const Index& i) { store_n(p, i, kLanes); }
RF_INLINE Vec add_where_n(Vec sum, Vec dy, const uint8_t* argmax, int i, int n) {
  uint8_t padded[kLanes] = {0};
  for (int j = 0; j < n; ++j) padded[j] = argmax[j];
  return add_where(sum, dy, padded, i);  // dy is zero beyond n
}
#endif

RF_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The taps k of [0, taps) with 0 <= start + k * dilation < size.
static Range valid_taps(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const int64_t end = floor_div(size - 1 - start, dilation) + 1;
  return {begin, end < taps ? end : taps};
}

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
        if (keep_index) take(&best, &at, v, index(int(r * s.S + q)));
        else best = max_nan(best, v);
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

// The windows that hold input coordinate `at`: outputs p of [0, outputs) with at + pad - p * stride = tap * dilation.
static Range covering(int64_t at, int64_t pad, int64_t stride, int64_t dilation, int64_t taps, int64_t outputs) {
  const int64_t span = at + pad - (taps - 1) * dilation;
  const int64_t begin = span <= 0 ? 0 : (span + stride - 1) / stride, end = (at + pad) / stride + 1;
  return {begin, end < outputs ? end : outputs};
}

// The windows over one input pixel: where their outputs lie in the image, and the place that would be this pixel.
struct Hit {
  int64_t offset;
  int place;
};

static int find_hits(const PoolShape& s, int64_t h, int64_t w, Range rows, Hit* hits) {
  const Range cols = covering(w, s.pad_w, s.stride_w, s.dilation_w, s.S, s.Q);
  int count = 0;
  for (int64_t p = rows.begin; p < rows.end; ++p) {
    const int64_t tap_h = h + s.pad_h - p * s.stride_h;
    if (tap_h % s.dilation_h) continue;
    for (int64_t q = cols.begin; q < cols.end; ++q) {
      const int64_t tap_w = w + s.pad_w - q * s.stride_w;
      if (tap_w % s.dilation_w) continue;
      hits[count++] = {(p * s.Q + q) * s.C, int(tap_h / s.dilation_h * s.S + tap_w / s.dilation_w)};
    }
  }
  return count;
}

template <class T>
static void backward(const MaxPoolBackwardArgs& a) {
  const PoolShape& s = a.shape;
  parallel(a.threads, [&](const Team& team) {
    const Range share = team.share(s.N * s.H);
    Hit hits[256];  // a window has at most 255 places, and each covering window another one
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
  if (a.argmax) f32 ? forward<float, true>(a) : forward<bf16, true>(a);
  else f32 ? forward<float, false>(a) : forward<bf16, false>(a);
}

void max_pool_backward(const MaxPoolBackwardArgs& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
}

}  // namespace RF_ISA
}  // namespace rf
