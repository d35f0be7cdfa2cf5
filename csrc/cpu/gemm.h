// The register tile every dense convolution ends in: kTileRows rows (pixels or Winograd tiles) by one panel of
// two vectors of output channels, accumulators in registers from the first input channel to the last.
// 2 * rows * panel * depth flops; a step of depth reads one word a row (broadcast) and two vectors of weights,
// so 14 x 2 needs 16 loads for 28 multiply-adds.
// Both operands are packed: rows as [chunk][row][kLanes words], weights as [word][kPanel], so that every
// address is one pointer plus a constant. Walking NHWC rows in place was tried: rows a power of two apart share L1
// sets. A word is a float, or a pair of bf16 that vdpbf16ps multiplies at once.
#pragma once
#include <utility>

#include "simd.h"

namespace rf {
namespace RF_ISA {

constexpr int kPanel = 2 * kLanes;  // output channels of a tile
#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators of 32 registers
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif
constexpr int kChain =
    128 / kLanes;  // chunks summed in registers before they join the total: one long chain rounds too often

template <class I>
RF_INLINE I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
RF_INLINE I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}
template <class I>
RF_INLINE I smaller(I a, I b) {
  return a < b ? a : b;
}
template <class I>
RF_INLINE I larger(I a, I b) {
  return a > b ? a : b;
}

struct Pair {
  bf16 low, high;
};

// What a word is made of, and how many of them.
template <class Word>
struct WordOf {
  using Element = float;
  static constexpr int kElements = 1;
};
template <>
struct WordOf<Pair> {
  using Element = bf16;
  static constexpr int kElements = 2;
};
template <class Word>
constexpr int kChunk = kLanes * WordOf<Word>::kElements;  // elements a row holds in one chunk

RF_INLINE Vec fetch(const float* p) { return load(p); }
RF_INLINE Vec spread(const float* p) { return broadcast(*p); }
RF_INLINE Vec multiply_add(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
#if defined(__AVX512BF16__)
using Bf16Word = Pair;
struct PairVec {
  __m512bh v;
};
RF_INLINE PairVec fetch(const Pair* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
RF_INLINE PairVec spread(const Pair* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return {(__m512bh)_mm512_set1_epi32(bits)};
}
RF_INLINE Vec multiply_add(PairVec a, PairVec b, Vec acc) { return {_mm512_dpbf16_ps(acc.v, a.v, b.v)}; }
#else
using Bf16Word = float;  // bf16 tensors are widened when they are packed
#endif

// What a tile brings into L2 while it multiplies, two streams, so many bytes a word of depth: the weights of the panel
// after this one, and what the block after this one reads and writes. A panel is multiplied by every tile of a block,
// so its successor arrives spread over all of them: memory works while the tiles compute from L2. Fetching 4 KB ahead
// leaves memory idle from the second tile on: 7x7x512 at batch 1 then took 1.25 times as long, resnet18 1.05 to 1.1
// times.
struct Ahead {
  const char* weights = nullptr;
  const char* data = nullptr;
  int64_t weights_step = 0, data_step = 0;

  // The next `bytes` at `at`, to be there in `words` more words of depth.
  RF_INLINE static int64_t step(int64_t bytes, int64_t words) { return words > 0 ? (bytes + words - 1) / words : 0; }
};

// acc += a * b over `chunks` chunks of depth.
template <int kRows, class Word>
RF_INLINE void multiply(Vec (&acc)[kRows][2], const Word* a, const Word* b, int64_t chunks, Ahead& ahead) {
  constexpr int kSteps = 4;  // unrolled: 16 would only fill the instruction cache
  for (; chunks > 0; --chunks) {
    for (int part = 0; part < kLanes / kSteps; ++part) {
      RF_UNROLL for (int i = 0; i < kSteps; ++i) {
        const auto b0 = fetch(b + i * kPanel), b1 = fetch(b + i * kPanel + kLanes);
        __builtin_prefetch(ahead.weights, 0, 2);
        __builtin_prefetch(ahead.data, 0, 2);
        ahead.weights += ahead.weights_step;
        ahead.data += ahead.data_step;
        RF_UNROLL for (int r = 0; r < kRows; ++r) {
          const auto s = spread(a + r * kLanes + i);
          acc[r][0] = multiply_add(s, b0, acc[r][0]);
          acc[r][1] = multiply_add(s, b1, acc[r][1]);
        }
      }
      a += kSteps;
      b += kSteps * kPanel;
    }
    a += (kRows - 1) * kLanes;
  }
}

// acc = a * b. Depth is cut every kChain chunks and the parts added in order, always at the same places.
template <int kRows, class Word>
RF_INLINE void product(Vec (&acc)[kRows][2], const Word* a, const Word* b, int64_t chunks, Ahead& shared) {
  Ahead ahead = shared;  // in registers
  if (!ahead.weights) ahead.weights = reinterpret_cast<const char*>(b);
  if (!ahead.data) ahead.data = reinterpret_cast<const char*>(b);
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  if (chunks <= kChain) {
    multiply<kRows>(acc, a, b, chunks, ahead);
    shared = ahead;
    return;
  }
  alignas(64) float total[kRows * kPanel];
  std::memset(total, 0, sizeof(total));
  for (; chunks > 0; chunks -= kChain) {
    multiply<kRows>(acc, a, b, smaller(chunks, int64_t(kChain)), ahead);
    a += kChain * kRows * kLanes;
    b += kChain * kLanes * kPanel;
    RF_UNROLL for (int r = 0; r < kRows; ++r) {
      RF_UNROLL for (int n = 0; n < 2; ++n) {
        float* t = total + r * kPanel + n * kLanes;
        store(t, load(t) + acc[r][n]);
        acc[r][n] = zero();
      }
    }
  }
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    acc[r][0] = load(total + r * kPanel);
    acc[r][1] = load(total + r * kPanel + kLanes);
  }
  shared = ahead;
}

// What becomes of a tile's sums: y = relu(sum * scale + shift + residual), rows `stride` elements apart.
template <class T>
struct Epilogue {
  T* y;
  const T* residual;
  const float* scale;
  const float* shift;
  int64_t stride;
  int cols;  // of the panel
  bool relu;
};

template <class T>
RF_INLINE Vec finish(Vec sum, Vec scale, Vec shift, const T* residual, bool with_relu) {
  Vec v = fma(sum, scale, shift);
  if (residual) v = v + load(residual);
  return with_relu ? relu(v) : v;
}

// A panel cut short by the last output channel: rare, so through memory and out of line.
template <class T>
__attribute__((noinline)) void store_ragged(const float* sums, int rows, const Epilogue<T>& e) {
  for (int n = 0; n * kLanes < e.cols; ++n) {
    const int at = n * kLanes, cols = smaller(e.cols - at, kLanes);
    const Vec scale = e.scale ? load_n(e.scale + at, cols) : broadcast(1.f);
    const Vec shift = e.shift ? load_n(e.shift + at, cols) : zero();
    for (int r = 0; r < rows; ++r) {
      Vec v = fma(load(sums + r * kPanel + at), scale, shift);
      if (e.residual) v = v + load_n(e.residual + r * e.stride + at, cols);
      store_n(e.y + r * e.stride + at, e.relu ? relu(v) : v, cols);
    }
  }
}

template <int kRows, class Word, class T>
void conv_tile(const Word* a, const Word* b, int64_t chunks, const Epilogue<T>& e, Ahead& ahead) {
  // The rows of y and residual are far apart, so only this brings them in while the sums are made.
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < int64_t(kPanel * sizeof(T)); i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(e.y + r * e.stride) + i, 1);
      if (e.residual) __builtin_prefetch(reinterpret_cast<const char*>(e.residual + r * e.stride) + i);
    }
  }
  Vec acc[kRows][2];
  product<kRows>(acc, a, b, chunks, ahead);
  if (e.cols < kPanel) {
    alignas(64) float sums[kRows * kPanel];
    RF_UNROLL for (int r = 0; r < kRows; ++r) {
      store(sums + r * kPanel, acc[r][0]);
      store(sums + r * kPanel + kLanes, acc[r][1]);
    }
    store_ragged(sums, kRows, e);
    return;
  }
  RF_UNROLL for (int n = 0; n < 2; ++n) {
    const Vec scale = e.scale ? load(e.scale + n * kLanes) : broadcast(1.f);
    const Vec shift = e.shift ? load(e.shift + n * kLanes) : zero();
    T* y = e.y + n * kLanes;
    if (e.residual) {
      const T* residual = e.residual + n * kLanes;
      RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][n] =
          fma(acc[r][n], scale, shift) + load(residual + r * e.stride);
    } else {
      RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][n] = fma(acc[r][n], scale, shift);
    }
    if (e.relu) {
      RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][n] = relu(acc[r][n]);
    }
    RF_UNROLL for (int r = 0; r < kRows; ++r) store(y + r * e.stride, acc[r][n]);
  }
}

template <class Word, class T>
using ConvTile = void (*)(const Word*, const Word*, int64_t, const Epilogue<T>&, Ahead&);

// The tile for each number of rows; [0] is unused.
template <class Word, class T>
struct ConvTiles {
  ConvTile<Word, T> at[kTileRows + 1];
  template <int... I>
  static constexpr ConvTiles make(std::integer_sequence<int, I...>) {
    return {{nullptr, conv_tile<I + 1, Word, T>...}};
  }
};
template <class Word, class T>
constexpr ConvTiles<Word, T> kConvTiles = ConvTiles<Word, T>::make(std::make_integer_sequence<int, kTileRows>());

// The bare sums, rows kPanel apart: what Winograd's output transform reads.
template <int kRows, class Word>
void sum_tile(const Word* a, const Word* b, int64_t chunks, float* sums, Ahead& ahead) {
  Vec acc[kRows][2];
  product<kRows>(acc, a, b, chunks, ahead);
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    store(sums + r * kPanel, acc[r][0]);
    store(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

template <class Word>
struct SumTiles {
  void (*at[kTileRows + 1])(const Word*, const Word*, int64_t, float*, Ahead&);
  template <int... I>
  static constexpr SumTiles make(std::integer_sequence<int, I...>) {
    return {{nullptr, sum_tile<I + 1, Word>...}};
  }
};
template <class Word>
constexpr SumTiles<Word> kSumTiles = SumTiles<Word>::make(std::make_integer_sequence<int, kTileRows>());

// `rows` rows in as few tiles as can be, of even height: tile i is rows [first(i), first(i + 1)).
struct TileRows {
  int64_t rows, tiles;
  explicit TileRows(int64_t n = 0) : rows(n), tiles(ceil_div(n, int64_t(kTileRows))) {}
  int64_t first(int64_t i) const { return rows * i / tiles; }
};

// Rows cut into blocks of about `block`: full tiles where that divides, even blocks where it does not.
struct Blocks {
  int64_t rows, step;
  Blocks(int64_t n, int64_t block) : rows(n), step(block) {
    if (n > 0 && n % kTileRows != 0) step = ceil_div(n, ceil_div(n, block));
  }
};

// Shares of a team are whole tiles where there are many, even where a tile more or less would unbalance it.
RF_INLINE int64_t share_grain(int64_t rows, int threads) {
  return rows >= int64_t(6) * kTileRows * threads ? kTileRows : 1;
}

}  // namespace RF_ISA
}  // namespace rf
