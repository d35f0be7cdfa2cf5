// Large output buffers, kept between calls (buffers.h).
#include "buffers.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace rf {

namespace {

constexpr size_t kHugePage = 2u << 20;
constexpr size_t kGrain = 64u << 10;  // of a buffer: whole huge pages would waste 14 % of a 12.25 MB tensor
constexpr size_t kMostSpare = 24u << 20, kSpareOfPeak = 16;

size_t round_up(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }
#ifdef __linux__
// Asked for as it is first: the kernel then puts a block right below the one before it, and join() can make them one. A
// margin cut off for alignment would keep them apart.
void* map(size_t bytes) {
  const auto ask = [](size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(at);
  };
  const auto past = [](char* at) { return reinterpret_cast<uintptr_t>(at) % kHugePage; };
  char* at = ask(bytes);
  if (past(at)) {
    munmap(at, bytes);
    at = ask(bytes + kHugePage);
    const size_t skip = (kHugePage - past(at)) % kHugePage;
    if (skip) munmap(at, skip);
    if (skip != kHugePage) munmap(at + skip + bytes, kHugePage - skip);
    at += skip;
  }
  madvise(at, bytes, MADV_HUGEPAGE);  // a wish: refused, all still works
  return at;
}
void unmap(void* data, size_t bytes) { munmap(data, bytes); }
constexpr bool kDivisible = true;  // any pages of mapped memory can be given back, whatever they were mapped with
#else
void* map(size_t bytes) {
  void* data = std::aligned_alloc(64, bytes);
  if (!data) throw std::bad_alloc();
  return data;
}
void unmap(void* data, size_t) { std::free(data); }
constexpr bool kDivisible = false;
#endif

struct Buffers {
  std::mutex mutex;
  std::unordered_map<void*, size_t> used;  // address -> size
  std::map<char*, size_t> kept;            // address -> size: neighbours are one block
  std::set<std::pair<size_t, char*>> by_size;
  size_t used_bytes = 0, kept_bytes = 0, peak_bytes = 0;
  bool spare = true;

  void keep(char* at, size_t bytes) {
    kept.emplace(at, bytes), by_size.emplace(bytes, at);
    kept_bytes += bytes;
  }
  void drop(char* at, size_t bytes) {
    kept.erase(at), by_size.erase({bytes, at});
    kept_bytes -= bytes;
  }
  // keep(), as one block with the kept neighbours.
  void join(char* at, size_t bytes) {
    if (kDivisible) {
      const auto after = kept.find(at + bytes);
      if (after != kept.end()) {
        const size_t more = after->second;
        drop(at + bytes, more);
        bytes += more;
      }
      auto before = kept.lower_bound(at);
      if (before != kept.begin() && (--before)->first + before->second == at) {
        const auto [first, more] = *before;
        drop(first, more);
        at = first;
        bytes += more;
      }
    }
    keep(at, bytes);
  }
};

// Never destroyed: tensors may outlive every static. A fork waits for the lock, so that the child does not inherit it
// held.
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

// Unmaps kept blocks, the smallest first, until at most `most` bytes are kept; returns how many bytes that were.
size_t trim(Buffers& b, size_t most) {
  const size_t before = b.kept_bytes;
  while (b.kept_bytes > most) {
    const auto [size, at] = *b.by_size.begin();
    const size_t excess = b.kept_bytes - most, left = kDivisible && size > excess ? size - excess : 0;
    b.drop(at, size);
    unmap(at + left, size - left);
    if (left) b.keep(at, left);
  }
  return before - b.kept_bytes;
}

// A kept block for `size` bytes, or the end. The one that lies highest, of which the top is cut off: buffers that live
// long gather there, and what is free stays in fewer pieces than by the tightest fit.
std::map<char*, size_t>::const_iterator find_kept(const Buffers& b, size_t size) {
  if (!kDivisible) {
    const auto fit = b.by_size.lower_bound({size, nullptr});
    return fit != b.by_size.end() && fit->first <= size + size / 4 ? b.kept.find(fit->second) : b.kept.end();
  }
  const auto top =
      std::find_if(b.kept.rbegin(), b.kept.rend(), [&](const auto& block) { return block.second >= size; });
  return top == b.kept.rend() ? b.kept.end() : std::prev(top.base());
}

}  // namespace

void* take_buffer(size_t bytes) {
  const size_t size = round_up(bytes ? bytes : 1, kGrain);
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  char* data = nullptr;
  size_t given = size;
  if (const auto found = find_kept(b, size); found != b.kept.end()) {
    const auto [at, whole] = *found;
    b.drop(at, whole);
    if (!kDivisible) given = whole;
    data = at + whole - given;
    if (whole > given) b.keep(at, whole - given);
  } else {
    const size_t mapped = kDivisible ? round_up(size, kHugePage) : size;
    const size_t peak = std::max(b.peak_bytes, b.used_bytes + mapped);
    const size_t spare = b.spare ? std::min(peak / kSpareOfPeak, kMostSpare) : 0;
    trim(b, peak + spare - b.used_bytes - mapped);
    data = static_cast<char*>(map(mapped));
    if (mapped > size) b.join(data + size, mapped - size);
  }
  b.used.emplace(data, given);
  b.used_bytes += given;
  b.peak_bytes = std::max(b.peak_bytes, b.used_bytes);
  return data;
}

void give_buffer(void* data) {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  const auto found = b.used.find(data);
  if (found == b.used.end()) return;
  char* at = static_cast<char*>(data);
  const size_t size = found->second;
  b.used.erase(found);
  b.used_bytes -= size;
  b.join(at, size);
}

size_t release_buffers() {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  b.peak_bytes = b.used_bytes;
  return trim(b, 0);
}

void keep_spare(bool spare) {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  b.spare = spare;
}

size_t buffers_in_use() {
  Buffers& b = buffers();
  const std::lock_guard<std::mutex> lock(b.mutex);
  return b.used_bytes;
}

}  // namespace rf
