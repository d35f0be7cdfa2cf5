// Scratch of the calling thread, kept between calls: fresh pages would fault each time.
#pragma once
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace rf {
namespace RF_ISA {

constexpr size_t kLargeScratch = 4u << 20, kHugePage = 2u << 20;

// At least `floats` floats, 64-byte aligned; the previous contents and address are lost. Large ones ask for huge pages:
// the transforms write to dozens of streams pages apart, more than the first TLB holds.
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
    const size_t align = floats * 4 >= kLargeScratch ? kHugePage : 64, bytes = (floats * 4 + align - 1) / align * align;
    buffer.data = static_cast<float*>(std::aligned_alloc(align, bytes));
    if (!buffer.data) throw std::bad_alloc();
#ifdef __linux__
    if (align == kHugePage) madvise(buffer.data, bytes, MADV_HUGEPAGE);  // a wish: refused, all still works
#endif
    buffer.size = floats;
  }
  return buffer.data;
}

}  // namespace RF_ISA
}  // namespace rf
