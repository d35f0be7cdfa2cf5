// The convolution algorithms of one instruction set and the words they share.
#pragma once
#include "../conv.h"
#include "gemm.h"
#include "parallel.h"

namespace rf {
namespace RF_ISA {

// One way to compute a convolution. conv.cpp keeps the list; its order is the numbering callers see.
struct Algorithm {
  const char* name;
  int high, wide;  // outputs of a tile
  const char* (*why_not)(const ConvShape&, DType);
  ConvConfig (*defaults)(const ConvShape&, DType, int threads);  // block sizes, without `algorithm`
  size_t (*packed_bytes)(const ConvShape&, DType);
  void (*pack)(const ConvShape&, DType, void* packed, const float* w, const float* fold, int threads);
  size_t (*scratch_bytes)(const ConvShape&, DType, const ConvConfig&, int threads);
  void (*run)(const ConvArgs&, const Team&);
  bool (*takes_moments)(const ConvShape&, const ConvConfig&) = nullptr;  // null: never
  bool (*takes_norm)(const ConvShape&, DType, const ConvConfig&) = nullptr;
};

extern const Algorithm kDirect, kWinograd4, kWinograd4x2, kWinograd2, kWinograd4Strided, kGrouped, kStem, kWinogradStem,
    kStrassen;

// Bytes rounded up to an odd number of cache lines: buffers a power of two apart would share cache sets.
RF_INLINE size_t odd_lines(size_t bytes) { return (ceil_div(bytes, size_t(64)) | 1) * 64; }

RF_INLINE int64_t depth_of(const ConvShape& s) { return s.R * s.S * (s.C / s.groups); }

// Sharing output channels instead of rows pays where a thread's rows would not fill one tile.
RF_INLINE bool prefer_split_cols(int64_t rows, int64_t cols, int threads) {
  return threads > 1 && rows < int64_t(kTileRows) * threads && cols >= int64_t(2 * kPanel) * threads;
}

}  // namespace RF_ISA
}  // namespace rf
