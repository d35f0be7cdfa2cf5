// SIMD words, one set per instruction set: a vector of kLanes floats, loads that widen, stores that round.
// bf16 storage is uint16-sized; every arithmetic word is float32. Stores round to nearest even and keep NaN.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define RF_INLINE inline __attribute__((always_inline))
#define RF_UNROLL _Pragma("GCC unroll 64")

namespace rf {
namespace RF_ISA {

struct bf16 {
  uint16_t bits;
};

RF_INLINE float to_float(float v) { return v; }
RF_INLINE float to_float(bf16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
RF_INLINE void from_float(float v, float* out) { *out = v; }
RF_INLINE void from_float(float v, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  out->bits = v != v ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
RF_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
RF_INLINE Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
RF_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
RF_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
RF_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }  // p 64-byte aligned
RF_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
RF_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
RF_INLINE void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
RF_INLINE __m512 widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
RF_INLINE __m256i narrow(__m512 f) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(f);
#else
  const __m512i u = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
#endif
}
RF_INLINE Vec load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p))}; }
RF_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(a.v)); }
RF_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256((__m256i*)p, narrow(a.v)); }
RF_INLINE Vec load_n(const bf16* p, int n) { return {widen(_mm256_maskz_loadu_epi16(first(n), p))}; }
RF_INLINE void store_n(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a.v)); }
RF_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
RF_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
RF_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
RF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max(0, a) with the operands in the order that returns a NaN in `a`, as torch does.
RF_INLINE Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
// The larger; NaN in `a` or `b` wins.
RF_INLINE Vec max_nan(Vec a, Vec b) {
  const __m512 m = _mm512_max_ps(a.v, b.v);  // b where unordered
  return {_mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
// The one in the middle; which one, where there is a NaN, is open.
RF_INLINE Vec median(Vec a, Vec b, Vec c) {
  return {_mm512_max_ps(_mm512_min_ps(a.v, b.v), _mm512_min_ps(_mm512_max_ps(a.v, b.v), c.v))};
}
RF_INLINE Vec finite_or_zero(Vec a) {
  const __m512 none = _mm512_sub_ps(a.v, a.v);  // 0, or NaN
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(none, none, _CMP_ORD_Q), a.v)};
}
// dy where !(y <= 0): torch's gradient passes at NaN.
RF_INLINE Vec relu_mask(Vec y, Vec dy) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_setzero_ps(), _CMP_NLE_UQ), dy.v)};
}
RF_INLINE void stream_fence() { _mm_sfence(); }
// Which lane each lane reads, for permute().
struct Lanes {
  __m512i v;
};
RF_INLINE Lanes load_lanes(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
RF_INLINE Lanes next(Lanes a) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(1))}; }
RF_INLINE Vec permute(Vec a, Lanes from) { return {_mm512_permutexvar_ps(from.v, a.v)}; }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
RF_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
RF_INLINE Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
RF_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
RF_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
RF_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }  // p 32-byte aligned
RF_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RF_INLINE Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
RF_INLINE void store_n(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
RF_INLINE __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
RF_INLINE __m128i narrow(__m256 f) {
  const __m256i u = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  const __m256i both = _mm256_blendv_epi8(r, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}
RF_INLINE Vec load(const bf16* p) { return {widen(_mm_loadu_si128((const __m128i*)p))}; }
RF_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow(a.v)); }
RF_INLINE void stream(bf16* p, Vec a) { _mm_stream_si128((__m128i*)p, narrow(a.v)); }
RF_INLINE Vec load_n(const bf16* p, int n) {
  alignas(16) uint16_t t[8] = {0};
  std::memcpy(t, p, size_t(n) * 2);
  return {widen(_mm_load_si128((const __m128i*)t))};
}
RF_INLINE void store_n(bf16* p, Vec a, int n) {
  alignas(16) uint16_t t[8];
  _mm_store_si128((__m128i*)t, narrow(a.v));
  std::memcpy(p, t, size_t(n) * 2);
}
RF_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
RF_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
RF_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
RF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
RF_INLINE Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
RF_INLINE Vec max_nan(Vec a, Vec b) {
  const __m256 m = _mm256_max_ps(a.v, b.v);
  return {_mm256_blendv_ps(m, a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
RF_INLINE Vec median(Vec a, Vec b, Vec c) {
  return {_mm256_max_ps(_mm256_min_ps(a.v, b.v), _mm256_min_ps(_mm256_max_ps(a.v, b.v), c.v))};
}
RF_INLINE Vec finite_or_zero(Vec a) {
  const __m256 none = _mm256_sub_ps(a.v, a.v);
  return {_mm256_and_ps(_mm256_cmp_ps(none, none, _CMP_ORD_Q), a.v)};
}
RF_INLINE Vec relu_mask(Vec y, Vec dy) {
  return {_mm256_and_ps(_mm256_cmp_ps(y.v, _mm256_setzero_ps(), _CMP_NLE_UQ), dy.v)};
}
RF_INLINE void stream_fence() { _mm_sfence(); }
struct Lanes {
  __m256i v;
};
RF_INLINE Lanes load_lanes(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
RF_INLINE Lanes next(Lanes a) { return {_mm256_add_epi32(a.v, _mm256_set1_epi32(1))}; }
RF_INLINE Vec permute(Vec a, Lanes from) { return {_mm256_permutevar8x32_ps(a.v, from.v)}; }

#else  // portable: four floats the compiler may map to whatever it has (SSE2, NEON)

constexpr int kLanes = 4;
struct Vec {
  float v[4];
};
#define RF_LANES(expr)                                \
  Vec out;                                            \
  for (int i = 0; i < kLanes; ++i) out.v[i] = (expr); \
  return out
RF_INLINE Vec broadcast(float s) { RF_LANES(s); }
RF_INLINE Vec zero() { return broadcast(0.f); }
template <class T>
RF_INLINE Vec load(const T* p) {
  RF_LANES(to_float(p[i]));
}
template <class T>
RF_INLINE Vec load_n(const T* p, int n) {
  RF_LANES(i < n ? to_float(p[i]) : 0.f);
}
template <class T>
RF_INLINE void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) from_float(a.v[i], p + i);
}
template <class T>
RF_INLINE void store(T* p, Vec a) {
  store_n(p, a, kLanes);
}
template <class T>
RF_INLINE void stream(T* p, Vec a) {
  store_n(p, a, kLanes);
}
RF_INLINE Vec operator+(Vec a, Vec b) { RF_LANES(a.v[i] + b.v[i]); }
RF_INLINE Vec operator-(Vec a, Vec b) { RF_LANES(a.v[i] - b.v[i]); }
RF_INLINE Vec operator*(Vec a, Vec b) { RF_LANES(a.v[i] * b.v[i]); }
RF_INLINE Vec fma(Vec a, Vec b, Vec c) { RF_LANES(a.v[i] * b.v[i] + c.v[i]); }
RF_INLINE Vec relu(Vec a) { RF_LANES(a.v[i] <= 0.f ? 0.f : a.v[i]); }
RF_INLINE Vec max_nan(Vec a, Vec b) { RF_LANES(a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]); }
RF_INLINE float lesser(float a, float b) { return a < b ? a : b; }
RF_INLINE float greater(float a, float b) { return a > b ? a : b; }
RF_INLINE Vec median(Vec a, Vec b, Vec c) {
  RF_LANES(greater(lesser(a.v[i], b.v[i]), lesser(greater(a.v[i], b.v[i]), c.v[i])));
}
RF_INLINE Vec finite_or_zero(Vec a) { RF_LANES(a.v[i] - a.v[i] == 0.f ? a.v[i] : 0.f); }
RF_INLINE Vec relu_mask(Vec y, Vec dy) { RF_LANES(y.v[i] <= 0.f ? 0.f : dy.v[i]); }
RF_INLINE void stream_fence() {}
struct Lanes {
  int32_t v[kLanes];
};
RF_INLINE Lanes load_lanes(const int32_t* p) {
  Lanes out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
RF_INLINE Lanes next(Lanes a) {
  for (int i = 0; i < kLanes; ++i) ++a.v[i];
  return a;
}
RF_INLINE Vec permute(Vec a, Lanes from) { RF_LANES(a.v[from.v[i]]); }
#undef RF_LANES

#endif

// 4 x 4 floats, rows to columns; rows `from_row` and `to_row` apart.
RF_INLINE void transpose4(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(__AVX2__)
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * from_row);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_row, row[i]);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_row + i] = from[i * from_row + j];
#endif
}

}  // namespace RF_ISA
}  // namespace rf
