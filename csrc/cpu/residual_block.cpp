// What a residual block needs besides convolutions and norms: the pixels a strided 1x1 projection reads, as a dense
// tensor, and the gradient of that. Bytes: the small tensor twice (gather), three times (add).
// The idea: a strided 1x1 convolution is a dense one between these. Its data gradient as such writes zeros to the three
// pixels of four it does not reach (14x14x1024: 136 GFLOP/s, dense 200), its weight gradient gathers for every block.
#include "../residual_block.h"

#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

namespace {

template <class Body>
void for_pixels(const StridedPixelsArgs& a, const Body& body) {
  const ConvShape& s = a.shape;
  const int64_t row = s.C * int64_t(dtype_size(a.dtype));
  parallel(a.threads, [&](const Team& team) {
    team.each(s.N * s.P, [&](int64_t i) {
      const int64_t n = i / s.P, p = i % s.P;
      char* large = static_cast<char*>(a.large) + (n * s.H + p * s.stride_h) * s.W * row;
      char* small = static_cast<char*>(a.small) + i * s.Q * row;
      for (int64_t q = 0; q < s.Q; ++q) body(large + q * s.stride_w * row, small + q * row);
    });
  });
}

template <class T>
void add_pixels(const StridedPixelsArgs& a) {
  const int64_t channels = a.shape.C, whole = channels / kLanes * kLanes;
  const int tail = int(channels - whole);
  for_pixels(a, [&](char* large, char* small) {
    T* to = reinterpret_cast<T*>(large);
    const T* from = reinterpret_cast<const T*>(small);
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(to + c) + load(from + c));
    if (tail) store_n(to + whole, load_n(to + whole, tail) + load_n(from + whole, tail), tail);
  });
}

}  // namespace

void gather_strided_pixels(const StridedPixelsArgs& a) {
  const size_t row = size_t(a.shape.C) * dtype_size(a.dtype);
  for_pixels(a, [&](char* large, char* small) { std::memcpy(small, large, row); });
}

void add_strided_pixels(const StridedPixelsArgs& a) {
  a.dtype == DType::f32 ? add_pixels<float>(a) : add_pixels<bf16>(a);
}

}  // namespace RF_ISA
}  // namespace rf
