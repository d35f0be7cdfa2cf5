// Packs: what one thread moves at once. 16 bytes where the channels allow it, one element where they do not.
// Storage is float, bf16 or f16; arithmetic is float. The 16-bit types are bits and three conversions in inline PTX:
// cuda_fp16.h and cuda_bf16.h would add a second of nvcc to every file that includes this one.
#pragma once
#include <cstdint>

namespace rf::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2, "storage types are bare bits");

constexpr int kPackBytes = 16;  // the widest access every architecture from sm_80 on has
template <class T>
constexpr int kVec = kPackBytes / int(sizeof(T));

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = unsigned;
};
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<1> {
  using type = unsigned char;
};

// V elements of T as they lie in memory.
template <class T, int V>
using Raw = typename RawOf<int(sizeof(T)) * V>::type;

// Read again soon by another kernel: keep it in L2. Read for the last time: let it go first.
template <class T, int V>
__device__ __forceinline__ Raw<T, V> load_keep(const T* p) {
  return __ldg(reinterpret_cast<const Raw<T, V>*>(p));
}
template <class T, int V>
__device__ __forceinline__ Raw<T, V> load_last(const T* p) {
  return __ldcs(reinterpret_cast<const Raw<T, V>*>(p));
}
template <class T, int V>
__device__ __forceinline__ void store(T* p, Raw<T, V> v) {
  *reinterpret_cast<Raw<T, V>*>(p) = v;  // the next operator reads it: no streaming hint
}

__device__ __forceinline__ float low_f32(uint32_t w, bf16) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high_f32(uint32_t w, bf16) { return __uint_as_float(w & 0xffff0000u); }
__device__ __forceinline__ float low_f32(uint32_t w, f16) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(w)));
  return f;
}
__device__ __forceinline__ float high_f32(uint32_t w, f16) { return low_f32(w >> 16, f16{}); }
__device__ __forceinline__ uint32_t pair(float low, float high, bf16) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
__device__ __forceinline__ uint32_t pair(float low, float high, f16) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}

template <class T, int V>
__device__ __forceinline__ void widen(float (&out)[V], Raw<T, V> raw) {
  if constexpr (sizeof(T) == 4) {
    static_assert(V == 1 || V == 4, "a pack of floats is one or four");
    if constexpr (V == 4) {
      out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
      out[2] = __uint_as_float(raw.z), out[3] = __uint_as_float(raw.w);
    } else {
      out[0] = __uint_as_float(raw);
    }
  } else if constexpr (V == 1) {
    out[0] = low_f32(raw, T{});
  } else {
    static_assert(V == 8, "a pack of 16-bit elements is one or eight");
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[2 * i] = low_f32(w[i], T{}), out[2 * i + 1] = high_f32(w[i], T{});
  }
}

// Rounds to nearest even.
template <class T, int V>
__device__ __forceinline__ Raw<T, V> narrow(const float (&f)[V]) {
  if constexpr (sizeof(T) == 4) {
    if constexpr (V == 4) {
      return {__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3])};
    } else {
      return __float_as_uint(f[0]);
    }
  } else if constexpr (V == 1) {
    return uint16_t(pair(f[0], 0.f, T{}));
  } else {
    return {pair(f[0], f[1], T{}), pair(f[2], f[3], T{}), pair(f[4], f[5], T{}), pair(f[6], f[7], T{})};
  }
}

// max(v, floor) that keeps NaN, as torch's ReLU does; fmaxf would drop it. floor is 0, or -inf for no activation.
__device__ __forceinline__ float max_nan(float v, float floor) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(v), "f"(floor));
  return m;
}
constexpr float kNoFloor = -__builtin_huge_valf();

// What rounds to zero in T: a mask made from the unrounded value must treat it as torch treats the stored zero.
template <class T>
struct ZeroBelow {
  static constexpr float value = 0.f;
};
template <>
struct ZeroBelow<bf16> {
  static constexpr float value = 0x1p-134f;  // half the smallest subnormal, and the tie goes to even, which is 0
};
template <>
struct ZeroBelow<f16> {
  static constexpr float value = 0x1p-25f;
};

}  // namespace rf::cuda
