// What max_pool and bn_act_max_pool2d share: window indices as vectors, the taps of a window that lie in the image,
// and the windows over an input pixel. Channels are the vector; an index is a byte in memory, r * S + s in its window.
#pragma once
#include "../max_pool.h"
#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

constexpr int kNoPlace = 255;  // no tap of a window; windows of 256 taps and more are refused

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
// kNoPlace where the maximum is not above 0: no gradient passes the ReLU there (a NaN passes, as in torch).
RF_INLINE Index where_positive(Index at, Vec best) {
  return {_mm512_mask_mov_epi32(at.v, _mm512_cmp_ps_mask(best.v, _mm512_setzero_ps(), _CMP_LE_OQ),
                                _mm512_set1_epi32(kNoPlace))};
}
RF_INLINE void store(uint8_t* p, Index i) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(i.v)); }
RF_INLINE void store_n(uint8_t* p, Index i, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(i.v)); }
// sum + dy where argmax is i.
RF_INLINE Vec add_where(Vec sum, Vec dy, const uint8_t* argmax, int i) {
  const __mmask16 hit = _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i*)argmax), _mm_set1_epi8(char(i)));
  return {_mm512_mask_add_ps(sum.v, hit, sum.v, dy.v)};
}
RF_INLINE Vec add_where_n(Vec sum, Vec dy, const uint8_t* argmax, int i, int n) {
  const __mmask16 hit =
      _mm_mask_cmpeq_epi8_mask(first(n), _mm_maskz_loadu_epi8(first(n), argmax), _mm_set1_epi8(char(i)));
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
RF_INLINE Index where_positive(Index at, Vec best) {
  const __m256i dead = _mm256_castps_si256(_mm256_cmp_ps(best.v, _mm256_setzero_ps(), _CMP_LE_OQ));
  _mm256_storeu_si256((__m256i*)at.v, _mm256_blendv_epi8(lanes(at), _mm256_set1_epi32(kNoPlace), dead));
  return at;
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
RF_INLINE Index where_positive(Index at, const Vec& best) {
  for (int j = 0; j < kLanes; ++j) at.v[j] = best.v[j] <= 0.f ? kNoPlace : at.v[j];
  return at;
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
inline Range valid_taps(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const int64_t end = floor_div(size - 1 - start, dilation) + 1;
  return {begin, end < taps ? end : taps};
}

// The windows that hold input coordinate `at`: outputs p of [0, outputs) with at + pad - p * stride = tap * dilation.
inline Range covering(int64_t at, int64_t pad, int64_t stride, int64_t dilation, int64_t taps, int64_t outputs) {
  const int64_t span = at + pad - (taps - 1) * dilation;
  const int64_t begin = span <= 0 ? 0 : (span + stride - 1) / stride, end = (at + pad) / stride + 1;
  return {begin, end < outputs ? end : outputs};
}

// The windows over one input pixel: where their outputs lie in the image, and the place that would be this pixel.
constexpr int kMostHits = 256;  // a window has at most 255 taps, and each covering window another one
struct Hit {
  int64_t offset;
  int place;
};

// The tap at a distance from the window's corner, or -1 between two taps. Divides only where there is a dilation: a
// division takes as long as a vector's whole sum.
RF_INLINE int64_t tap_at(int64_t distance, int64_t dilation) {
  if (dilation == 1) return distance;
  return distance % dilation ? -1 : distance / dilation;
}

inline int find_hits(const PoolShape& s, int64_t h, int64_t w, Range rows, Hit* hits) {
  const Range cols = covering(w, s.pad_w, s.stride_w, s.dilation_w, s.S, s.Q);
  int count = 0;
  for (int64_t p = rows.begin; p < rows.end; ++p) {
    const int64_t tap_h = tap_at(h + s.pad_h - p * s.stride_h, s.dilation_h);
    if (tap_h < 0) continue;
    for (int64_t q = cols.begin; q < cols.end; ++q) {
      const int64_t tap_w = tap_at(w + s.pad_w - q * s.stride_w, s.dilation_w);
      if (tap_w >= 0) hits[count++] = {(p * s.Q + q) * s.C, int(tap_h * s.S + tap_w)};
    }
  }
  return count;
}

}  // namespace RF_ISA
}  // namespace rf
