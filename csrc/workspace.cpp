// Memory for one call (workspace.h).
#include "workspace.h"

#include <cstdlib>
#include <new>

#include "buffers.h"

namespace rf {

namespace {

constexpr size_t kLine = 64, kPooled = 4u << 20;  // bytes; from the second on memory is a buffer's

struct Own {
  char* data = nullptr;
  size_t size = 0;
  bool taken = false;
  ~Own() { std::free(data); }

  void grow(size_t bytes) {
    if (size >= bytes) return;
    std::free(data);
    size = 0;
    const size_t whole = (bytes + kLine - 1) / kLine * kLine;
    data = static_cast<char*>(std::aligned_alloc(kLine, whole));
    if (!data) throw std::bad_alloc();
    size = whole;
  }
};
thread_local Own own;

}  // namespace

Workspace::Workspace(size_t bytes) : pooled_(bytes >= kPooled || own.taken) {
  if (pooled_) {
    data_ = static_cast<char*>(take_buffer(bytes));
  } else {
    own.grow(bytes ? bytes : 1);
    own.taken = true;  // by whom another workspace may be wanted before this one goes
    data_ = own.data;
  }
}

Workspace::~Workspace() {
  if (pooled_)
    give_buffer(data_);
  else
    own.taken = false;
}

}  // namespace rf
