// Sums over rows: a thread's registers, then shuffles, then one stage of shared memory, then chunks in a fixed order.
// No float atomics: the order of additions depends on the cut of the matrix only, so results repeat bit for bit.
#pragma once
#include "tiles.h"
#include "vec.cuh"

namespace rf::cuda {

// Where this thread stands in the cut.
template <int V>
struct Place {
  int width, tx, ty, height;
  int chunk, first_channel;  // of the block
  int channel;               // of the thread's pack
  bool active;               // false: beyond the channels; the thread still takes part in shuffles and barriers
  int64_t begin, end;        // rows of the chunk
  int mine;                  // rows of this thread: begin + ty, begin + ty + height, ...; 0 where inactive

  __device__ explicit Place(const Tiles& t) {
    width = 1 << t.log_width;
    tx = threadIdx.x & (width - 1);
    ty = threadIdx.x >> t.log_width;
    height = kThreads >> t.log_width;
    chunk = int(blockIdx.x) / t.channel_tiles;
    const int tile = int(blockIdx.x) % t.channel_tiles;
    first_channel = tile * width * V;
    channel = first_channel + tx * V;
    active = channel < t.channels;
    begin = chunk * t.chunk_rows;
    end = begin + t.chunk_rows < t.rows ? begin + t.chunk_rows : t.rows;
    mine = active ? (int(end - begin) - ty + height - 1) >> (8 - t.log_width) : 0;
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(i, Count<U>) for U of the thread's rows at a time, so that U loads are in flight, then one by one.
template <int U, class Body>
__device__ __forceinline__ void for_rows(int begin, int end, const Body& body) {
  int i = begin;
  for (; i + U <= end; i += U) body(i, Count<U>{});
  for (; i < end; ++i) body(i, Count<1>{});
}

// The two numbers per channel that are merged, and how. Plain sums:
struct AddSums {
  static __device__ __forceinline__ void merge(float, float& a, float& b, float, float other_a, float other_b) {
    a += other_a;
    b += other_b;
  }
};
// Mean and sum of squared deviations (Chan, Golub and LeVeque): no cancellation, however far the mean is from zero.
struct ChanMoments {
  static __device__ __forceinline__ void merge(float n, float& mean, float& m2, float other_n, float other_mean,
                                               float other_m2) {
    const float total = n + other_n;
    const float share = total > 0.f ? other_n / total : 0.f;
    const float delta = other_mean - mean;
    mean = fmaf(delta, share, mean);
    m2 = fmaf(delta * delta, n * share, m2 + other_m2);
  }
};

template <int V>
struct Partial {
  float n = 0.f;  // rows in it; a count of rows fits a float exactly up to 2^24, and beyond that to 6e-8
  float a[V] = {};
  float b[V] = {};
};

// U rows at once, two passes in registers: their own mean, the deviations from it, then one merge for all of them.
template <int U, int V>
__device__ __forceinline__ void add_rows(Partial<V>& p, const float (&d)[U][V]) {
  const float total = p.n + U;
  const float share = U / total;
  const float weight = p.n * share;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int u = 0; u < U; ++u) sum += d[u][v];
    const float mean = sum * (1.f / U);
#pragma unroll
    for (int u = 0; u < U; ++u) squares = fmaf(d[u][v] - mean, d[u][v] - mean, squares);
    const float delta = mean - p.a[v];
    p.a[v] = fmaf(delta, share, p.a[v]);
    p.b[v] = fmaf(delta * delta, weight, p.b[v] + squares);
  }
  p.n = total;
}

struct MergeStore {
  float n[kWarps];
  float a[kWarps][kMaxColumns];
  float b[kWarps][kMaxColumns];
};

// Merges the block's threads. Thread t < width * V gets the t-th channel of the block; true for those threads.
template <class Merge, int V>
__device__ __forceinline__ bool block_merge(Partial<V>& p, const Place<V>& at, MergeStore& store, float& n, float& a,
                                            float& b) {
  const int warp = threadIdx.x / 32;
  for (int step = at.width; step < 32; step <<= 1) {
    const float other_n = __shfl_xor_sync(0xffffffffu, p.n, step);
    // The lower lane of a pair is the left operand in both, so that both get the same bits.
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float oa = __shfl_xor_sync(0xffffffffu, p.a[v], step), ob = __shfl_xor_sync(0xffffffffu, p.b[v], step);
      float la = upper ? oa : p.a[v], lb = upper ? ob : p.b[v];
      Merge::merge(upper ? other_n : p.n, la, lb, upper ? p.n : other_n, upper ? p.a[v] : oa, upper ? p.b[v] : ob);
      p.a[v] = la, p.b[v] = lb;
    }
    p.n += other_n;
  }
  if ((threadIdx.x & 31) < at.width) {
#pragma unroll
    for (int v = 0; v < V; ++v) store.a[warp][at.tx * V + v] = p.a[v], store.b[warp][at.tx * V + v] = p.b[v];
    if ((threadIdx.x & 31) == 0) store.n[warp] = p.n;
  }
#ifndef RF_PLANT_MISSING_BARRIER  // defined by the test that shows this barrier's absence is noticed
  __syncthreads();
#endif
  const int column = threadIdx.x;
  if (column >= at.width * V) return false;
  n = a = b = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    Merge::merge(n, a, b, store.n[w], store.a[w][column], store.b[w][column]);
    n += store.n[w];
  }
  return true;
}

__device__ __forceinline__ float chunk_count(const Tiles& t, int chunk) {
  const int64_t begin = chunk * t.chunk_rows;
  return float(begin + t.chunk_rows < t.rows ? t.chunk_rows : t.rows - begin);
}

// Where chunk i's two numbers of channel c lie in the workspace; chunk == chunks: the shift.
__device__ __forceinline__ int64_t partial_at(const Tiles& t, int chunk, int which, int c) {
  return (2 * int64_t(chunk) + which) * t.channels + c;
}

// Second stage: 8 channels by 32 groups of chunks a block. True for the 8 threads that hold a channel's result.
constexpr int kFinishColumns = 8;
constexpr int kFinishGroups = kThreads / kFinishColumns;

template <class Merge>
__device__ __forceinline__ bool merge_chunks(const Tiles& t, const float* partial, int& channel, float& a, float& b) {
  __shared__ float store_n[kWarps], store_a[kWarps][kFinishColumns], store_b[kWarps][kFinishColumns];
  const int column = threadIdx.x % kFinishColumns, group = threadIdx.x / kFinishColumns;
  channel = blockIdx.x * kFinishColumns + column;
  float n = 0.f;
  a = b = 0.f;
  for (int i = group; i < t.chunks; i += kFinishGroups) {
    const float count = chunk_count(t, i);
    if (channel < t.channels) {
      Merge::merge(n, a, b, count, partial[partial_at(t, i, 0, channel)], partial[partial_at(t, i, 1, channel)]);
    }
    n += count;
  }
  for (int step = kFinishColumns; step < 32; step <<= 1) {
    const float on = __shfl_xor_sync(0xffffffffu, n, step);
    const float oa = __shfl_xor_sync(0xffffffffu, a, step), ob = __shfl_xor_sync(0xffffffffu, b, step);
    const bool upper = threadIdx.x & step;
    float la = upper ? oa : a, lb = upper ? ob : b;
    Merge::merge(upper ? on : n, la, lb, upper ? n : on, upper ? a : oa, upper ? b : ob);
    a = la, b = lb, n += on;
  }
  const int warp = threadIdx.x / 32;
  if ((threadIdx.x & 31) < kFinishColumns) store_n[warp] = n, store_a[warp][column] = a, store_b[warp][column] = b;
  __syncthreads();
  if (threadIdx.x >= kFinishColumns || channel >= t.channels) return false;
  n = a = b = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    Merge::merge(n, a, b, store_n[w], store_a[w][column], store_b[w][column]);
    n += store_n[w];
  }
  return true;
}

}  // namespace rf::cuda
