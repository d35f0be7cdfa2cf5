// What the gradients of grouped convolutions with as many filters as channels share. The forward is conv_grouped.cpp.
#pragma once
#include "../conv_backward.h"
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

const char* wgrad_grouped_why_not(const ConvShape&);
void wgrad_grouped(const WgradArgs&);
const char* dgrad_grouped_why_not(const ConvShape&);
void dgrad_grouped(const DgradArgs&);

// Columns [first, first + count) of an image's row, whose pixels lie `width` elements apart, widened to one vector of
// `channels` channels each; zeros beside the image.
template <class T>
void copy_columns(float* to, const T* row, int64_t size, int64_t width, int64_t first, int64_t count, int channels) {
  const int64_t begin = smaller(larger(-first, int64_t(0)), count);
  const int64_t end = larger(smaller(size - first, count), begin);
  for (int64_t i = 0; i < begin; ++i) store(to + i * kLanes, zero());
  const T* from = row + (first + begin) * width;
  if (channels == kLanes) {
    for (int64_t i = begin; i < end; ++i, from += width) store(to + i * kLanes, load(from));
  } else {
    for (int64_t i = begin; i < end; ++i, from += width) store(to + i * kLanes, load_n(from, channels));
  }
  for (int64_t i = end; i < count; ++i) store(to + i * kLanes, zero());
}

}  // namespace RF_ISA
}  // namespace rf
