// What the bn_act kernels share: per-channel coefficients, made once a block and read by every thread of it.
#pragma once
#include "kernels.h"
#include "reduce.cuh"

namespace rf::cuda {

// Two blocks of 256 threads a multiprocessor may use 128 registers a thread; three at 80 spilled on sm_80. The cut of
// the matrix uses this number, not the compiler's: it is a function of the shape and the card alone, and so are
// results.
constexpr int kBlocksPerSm = 2;

// Rows a thread has in flight, for at least 32 kB a multiprocessor: statistics hold one tensor, the apply two, the
// backward kernels three.
template <int V>
constexpr int kStatisticsRows = V == 1 ? 8 : 6;
template <int V>
constexpr int kForwardRows = V == 1 ? 8 : 4;
template <int V>
constexpr int kBackwardRows = V == 8 ? 2 : 4;

// z = (x - mean) * scale + beta. The difference comes first: folding mean into a shift would lose all digits
// of z where the mean is far from zero. Forward and backward use this one expression, so the mask is the forward's.
struct Affine {
  float mean, scale, beta;
};
__device__ __forceinline__ float affine(float x, float mean, float scale, float beta) {
  return fmaf(x - mean, scale, beta);
}

__device__ __forceinline__ Affine affine_of(int c, const float* gamma, const float* beta, float mean, float var,
                                            float eps) {
  const float rstd = 1.f / sqrtf(var + eps);
  return {mean, gamma ? gamma[c] * rstd : rstd, beta ? beta[c] : 0.f};
}

// One thread a channel computes, all read: a division and a root for every thread would cost as much as a row of packs.
struct AffineStore {
  float mean[kMaxColumns], scale[kMaxColumns], beta[kMaxColumns];

  __device__ void set(int column, const Affine& v) {
    mean[column] = v.mean, scale[column] = v.scale, beta[column] = v.beta;
  }
};

template <int V>
struct AffinePack {
  float mean[V], scale[V], beta[V];

  __device__ AffinePack(const AffineStore& store, int tx) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = store.mean[tx * V + v], scale[v] = store.scale[tx * V + v], beta[v] = store.beta[tx * V + v];
    }
  }
  __device__ float operator()(float x, int v) const { return affine(x, mean[v], scale[v], beta[v]); }
};

template <int V>
__device__ __forceinline__ void fill_affine(AffineStore& store, const Place<V>& at, int channels, const float* gamma,
                                            const float* beta, const float* mean, const float* var, float eps) {
  const int column = threadIdx.x, c = at.first_channel + column;
  if (column < at.width * V && c < channels) store.set(column, affine_of(c, gamma, beta, mean[c], var[c], eps));
  __syncthreads();
}

// y = act(affine(x) + residual) for U packs already loaded.
template <class T, int V, int U>
__device__ __forceinline__ void finish_rows(T* y, const Raw<T, V> (&x)[U], const Raw<T, V> (&residual)[U],
                                            bool has_residual, const AffinePack<V>& f, float floor, int64_t step) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float z[V];
    widen<T, V>(z, x[u]);
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = f(z[v], v);
    if (has_residual) {
      float r[V];
      widen<T, V>(r, residual[u]);
#pragma unroll
      for (int v = 0; v < V; ++v) z[v] += r[v];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = max_nan(z[v], floor);
    store<T, V>(y + u * step, narrow<T, V>(z));
  }
}

}  // namespace rf::cuda
