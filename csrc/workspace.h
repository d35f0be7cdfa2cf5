// Memory for one call of a kernel: packed filters, transformed tiles, sums. Fresh pages for tens of megabytes cost more
// than what is done in them (filters of 7x7x512 packed at batch 16: 23 of 33 ms), so large ones are buffers
// (buffers.h), which the maps of a step and the calls after it use again, and small ones the calling thread's own, kept
// and grown.
#pragma once
#include <cstddef>

namespace rf {

class Workspace {
 public:
  // At least `bytes` bytes, 64-byte aligned, contents undefined. Throws std::bad_alloc.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* at(size_t offset) const { return data_ + offset; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  bool pooled_;
  char* data_;
};

}  // namespace rf
