// A team of threads over OpenMP (torch's own libgomp pool), even shares, and a barrier that spins, then sleeps.
#pragma once
#include <omp.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <atomic>

#include "../types.h"
#include "kernels.h"

namespace rf {
namespace RF_ISA {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins for about a layer's imbalance, then sleeps until it is woken. Where other processes want the cores, a pure spin
// starves the thread it waits for, and a yield is worse: it gives the core away for a whole time slice (measured with
// four competitors on two cores: resnet18 90 ms a call yielding).
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
      generation_.store(generation + 1, std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (generation_.load(std::memory_order_acquire) != generation) return;
      pause();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (generation_.load(std::memory_order_seq_cst) == generation) sleep(generation);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpins = 1 << 13;  // of 40 cycles or more each

#ifdef __linux__
  static_assert(sizeof(std::atomic<int>) == sizeof(int), "the kernel waits on a plain int");
  void sleep(int generation) {  // returns at once if the generation has moved on meanwhile
    syscall(SYS_futex, reinterpret_cast<int*>(&generation_), FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
  }
  void wake() {
    syscall(SYS_futex, reinterpret_cast<int*>(&generation_), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
  }
#else
  void sleep(int) { sched_yield(); }
  void wake() {}
#endif

  std::atomic<int> size_;
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
  std::atomic<int> sleepers_{0};
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
