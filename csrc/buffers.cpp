// Large output buffers, kept between calls (buffers.h).
#include "buffers.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace rf {

namespace {

constexpr size_t kHugePage = 2u << 20;
struct Buffers {
  std::mutex mutex;
  std::unordered_map<void*, size_t> used;    // address -> size
  std::multimap<size_t, void*> kept;         // size -> address
  size_t used_bytes = 0, kept_bytes = 0, peak_bytes = 0;
};

#ifdef __linux__
void* map(size_t bytes) {
  char* at = static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (at == MAP_FAILED) throw std::bad_alloc();
  const size_t skip = (kHugePage - reinterpret_cast<uintptr_t>(at) % kHugePage) % kHugePage;
  if (skip) munmap(at, skip);
  if (skip != kHugePage) munmap(at + skip + bytes, kHugePage - skip);
  madvise(at + skip, bytes, MADV_HUGEPAGE);  // a wish: refused, all still works
  return at + skip;
}
void unmap(void* data, size_t bytes) { munmap(data, bytes); }
#else
void* map(size_t bytes) {
  void* data = std::aligned_alloc(64, bytes);
  if (!data) throw std::bad_alloc();
  return data;
}
void unmap(void* data, size_t) { std::free(data); }
#endif

// Never destroyed: tensors may outlive every static. A fork waits for the lock, so that the child does not inherit it held.
Buffers& buffers() {
  static Buffers* const all = [] {
    auto* made = new Buffers;
#ifdef __linux__
    pthread_atfork([] { buffers().mutex.lock(); }, [] { buffers().mutex.unlock(); }, [] { buffers().mutex.unlock(); });
#endif
    return made;
  }();
  return *all;
}

// Unmaps kept blocks, the largest first, until at most `most` bytes are kept.
size_t trim(Buffers& b, size_t most) {
  size_t freed = 0;
  while (b.kept_bytes > most) {
    const auto last = std::prev(b.kept.end());
    unmap(last->second, last->first);
    freed += last->first;
    b.kept_bytes -= last->first;
    b.kept.erase(last);
  }
  return freed;
}

}  // namespace

void* take_buffer(size_t bytes) {
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  void* data = nullptr;
  size_t given = size;
  const auto fit = b.kept.lower_bound(size);
  if (fit != b.kept.end() && fit->first <= size + size / 4) {
    given = fit->first, data = fit->second;
    b.kept_bytes -= given;
    b.kept.erase(fit);
  } else {
    const size_t peak = b.peak_bytes > b.used_bytes + size ? b.peak_bytes : b.used_bytes + size;
    trim(b, peak - b.used_bytes - size);
    data = map(size);
  }
  b.used.emplace(data, given);
  b.used_bytes += given;
  if (b.used_bytes > b.peak_bytes) b.peak_bytes = b.used_bytes;
  return data;
}

void give_buffer(void* data) {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  const auto at = b.used.find(data);
  if (at == b.used.end()) return;
  b.used_bytes -= at->second;
  b.kept_bytes += at->second;
  b.kept.emplace(at->second, data);
  b.used.erase(at);
}

size_t release_buffers() {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  b.peak_bytes = b.used_bytes;
  return trim(b, 0);
}

size_t buffers_in_use() {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  return b.used_bytes;
}

}  // namespace rf
