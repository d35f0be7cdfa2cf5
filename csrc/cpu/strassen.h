// What the convolution (conv_strassen.cpp) and the weight gradient (wgrad_strassen.cpp) by Strassen's algorithm share.
#pragma once
#include "../types.h"
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

constexpr int kProducts = 7;  // of the quarters of two matrices

// Null: the convolution is a product of two float32 matrices, of pixels and of filters; else the reason.
RF_INLINE const char* strassen_why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "strassen rounds too often for bfloat16";
  if (s.R * s.S * s.stride_h * s.stride_w != 1 || s.pad_h + s.pad_w != 0)
    return "strassen takes 1x1 filters at stride 1 without padding";
  if (s.groups != 1) return "strassen takes one group";
  return nullptr;
}

}  // namespace RF_ISA
}  // namespace rf
