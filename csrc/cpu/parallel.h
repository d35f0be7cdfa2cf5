// A team of threads over OpenMP (torch's own libgomp pool): even shares, loops whose shares even out, and a barrier
// that spins, then sleeps.
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
#include <vector>

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

// Which pieces of a thread's share of a loop are taken: so many from the front, by itself, so many from the back, by
// others. All of it in one word, so that a piece has one taker.
class alignas(64) Claims {
 public:
  static constexpr int64_t kMost = (1 << 24) - 1;  // pieces

  // The owner enters its next loop; others take nothing of it before.
  uint64_t begin() {
    taken_.store(++loop_ << 48, std::memory_order_release);
    return loop_ << 48;
  }
  // How many were taken before from this end, or -1: all of `pieces` are, or the owner is not in this loop.
  int64_t from_front(uint64_t loop, int64_t pieces) { return take(loop, pieces, 0); }
  int64_t from_back(uint64_t loop, int64_t pieces) { return take(loop, pieces, 24); }

 private:
  int64_t take(uint64_t loop, int64_t pieces, int shift) {
    uint64_t now = taken_.load(std::memory_order_acquire);
    do {
      const int64_t front = int64_t(now & kMost), back = int64_t(now >> 24 & kMost);
      if (now >> 48 != loop >> 48 || front + back >= pieces) return -1;
    } while (!taken_.compare_exchange_weak(now, now + (uint64_t(1) << shift), std::memory_order_acq_rel));
    return int64_t(now >> shift & kMost);
  }

  std::atomic<uint64_t> taken_{0};  // loop, 16 bits; from the back, 24; from the front, 24
  uint64_t loop_ = 0;
};

struct Team {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;
  Claims* claims = nullptr;  // of every thread; null: shares stay as they are

  void sync() const {
    if (barrier) barrier->wait();
  }
  // This thread's share of [0, n), cut at multiples of `grain`: shares never depend on timing.
  Range share(int64_t n, int64_t grain = 1) const { return share_of(rank, n, grain); }
  Range share_of(int rank, int64_t n, int64_t grain = 1) const {
    const int64_t units = (n + grain - 1) / grain;
    const int64_t begin = units * rank / size * grain;
    const int64_t end = units * (rank + 1) / size * grain;
    return {begin < n ? begin : n, end < n ? end : n};
  }

  // body(owner, i) once for every piece i of pieces(owner): a thread's own from the first on, then of the others' what
  // they have not begun, from the last back. A core that other processes slow down holds the team up by a piece, not by
  // a share (on a busy host the waits of a resnet50 training step under autocast went from 56 ms of 1080 to 17 of 980).
  // What a piece computes must not depend on who does: only scratch may be the thread's.
  template <class Pieces, class Body>
  void each_piece(const Pieces& pieces, const Body& body) const {
    const int64_t own = pieces(rank);
    if (!claims || own > Claims::kMost) {
      for (int64_t i = 0; i < own; ++i) body(rank, i);
      return;
    }
    const uint64_t loop = claims[rank].begin();
    for (int64_t i; (i = claims[rank].from_front(loop, own)) >= 0;) body(rank, i);
    for (int other = 1; other < size; ++other) {
      const int owner = (rank + other) % size;
      const int64_t theirs = pieces(owner);
      for (int64_t i; (i = claims[owner].from_back(loop, theirs)) >= 0;) body(owner, theirs - 1 - i);
    }
  }
  // body(i) for every i of [0, n), body(range) for every `grain` of them, dealt out in even shares.
  template <class Body>
  void each(int64_t n, const Body& body) const {
    each_piece([&](int owner) { return share_of(owner, n).size(); },
               [&](int owner, int64_t i) { body(share_of(owner, n).begin + i); });
  }
  template <class Body>
  void each_range(int64_t n, int64_t grain, const Body& body) const {
    each((n + grain - 1) / grain,
         [&](int64_t i) { body(Range{i * grain, (i + 1) * grain < n ? (i + 1) * grain : n}); });
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
  std::vector<Claims> claims(static_cast<size_t>(threads));
#pragma omp parallel num_threads(threads)
  {
    barrier.resize(omp_get_num_threads());
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier, claims.data()});
  }
}

}  // namespace RF_ISA
}  // namespace rf
