// A team of threads over OpenMP (torch's own libgomp pool), even shares, and a barrier that yields.
#pragma once
#include <omp.h>

#include <atomic>
#include <thread>

#include "../types.h"
#include "kernels.h"

namespace rf {
namespace RF_ISA {

// Spins briefly, then yields: a pure spin collapses when another process takes the core.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  // OpenMP may give fewer threads than asked for (a thread limit, a nested region). Every thread says so before it
  // waits for the first time; they all say the same.
  void resize(int size) { size_.store(size, std::memory_order_relaxed); }
  void wait() {
    const int size = size_.load(std::memory_order_relaxed);
    if (size == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins > 4096) sched_yield();
    }
  }

 private:
  std::atomic<int> size_;
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

struct Team {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;

  void sync() const {
    if (barrier) barrier->wait();
  }
  // This thread's share of [0, n), cut at multiples of `grain`: shares never depend on timing.
  Range share(int64_t n, int64_t grain = 1) const {
    const int64_t units = (n + grain - 1) / grain;
    const int64_t begin = units * rank / size * grain;
    const int64_t end = units * (rank + 1) / size * grain;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

// Runs body(team) on `threads` threads. The count is always passed: raw OpenMP ignores
// torch.set_num_threads in a fresh Python thread.
template <class Body>
inline void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(Team{});
    return;
  }
  Barrier barrier(threads);
#pragma omp parallel num_threads(threads)
  {
    barrier.resize(omp_get_num_threads());
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
  }
}

}  // namespace RF_ISA
}  // namespace rf
