// Scratch of the calling thread, kept between calls: fresh pages would fault each time.
#pragma once
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace rf {
namespace RF_ISA {

// At least `floats` floats, 64-byte aligned; the previous contents and address are lost.
inline float* scratch(size_t floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, (floats + 15) / 16 * 64));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = floats;
  }
  return buffer.data;
}

}  // namespace RF_ISA
}  // namespace rf
