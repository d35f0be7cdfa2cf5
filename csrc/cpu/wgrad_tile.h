// The register tile of the weight gradients: up to kTileRows filters by one panel of input channels, summed over depth
// (pixels, or Winograd tiles). A step of depth is one broadcast a filter and two loads: 2 * rows * kPanel flops.
// A step's rows lie a stride apart, in a tensor or in a packed block: every line is read once a tile, so sets shared by
// rows a power of two apart cost nothing in L1, and L2 brings two or three lines in the time of a step.
// The sums join memory every `chain` steps.
#pragma once
#include "gemm.h"

namespace rf {
namespace RF_ISA {

// Rows of dw cut into strips of even height: strip i is [first(i), first(i + 1)).
struct Strips {
  int64_t rows, count;
  explicit Strips(int64_t n) : rows(n), count(ceil_div(n, int64_t(kTileRows))) {}
  RF_INLINE int64_t first(int64_t i) const { return rows * i / count; }
  RF_INLINE int64_t height(int64_t i) const { return first(i + 1) - first(i); }
};

// Floats are rounded least where sums and what is added to them are as long, sqrt(depth); at twice that, counting
// roundings, 1.12 times as much, and the sums are joined half as often (32 steps always: 784 additions in one chain at
// 56x56 and 6 % of the time).
inline int64_t chain_of(int64_t depth) {
  int64_t chain = 28;
  while (chain < 224 && chain * chain < 2 * depth) chain *= 2;
  return chain;
}

// Bytes to be brought into L2 while tiles multiply, `step` of them a step of depth. Packing alone waits for memory: at
// 56x56, 64 to 256, it took a third of the time, at 18 GB/s.
struct Stream {
  const char* at = nullptr;
  int64_t step = 0;

  Stream() = default;
  Stream(const void* begin, int64_t bytes, int64_t steps)
      : at(static_cast<const char*>(begin)), step(steps > 0 ? ceil_div(bytes, steps) : 0) {}
  RF_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
  void fetch_step() {  // of more than a line
    for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += step;
  }
};

// A tile's rows of one operand, from step to step of depth `stride` words apart.
template <class Word>
struct Operand {
  const Word* at;
  int64_t stride;
  template <class V>
  RF_INLINE void load_panel(V& low, V& high) const {
    low = fetch(at), high = fetch(at + kLanes);
  }
  RF_INLINE void next() { at += stride; }
};

#if defined(__AVX512BF16__)
// A panel of a bf16 tensor as it lies, two pixels a step: the words are made in registers, in another order of
// channels.
struct PixelPairs {
  const bf16* at;
  int64_t pixel;  // elements from one to the next
  RF_INLINE void load_panel(PairVec& low, PairVec& high) const {
    const __m512i one = _mm512_loadu_si512(at), two = _mm512_loadu_si512(at + pixel);
    low = {(__m512bh)_mm512_unpacklo_epi16(one, two)};
    high = {(__m512bh)_mm512_unpackhi_epi16(one, two)};
  }
  RF_INLINE void next() { at += 2 * pixel; }
  // A row of sums in the order of channels: unpacking takes four of every eight.
  static RF_INLINE void restore(float* row) {
    const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + kLanes);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(row, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(row + kLanes, _mm512_permutex2var_ps(low, last, high));
  }
};
#else
struct PixelPairs {  // words are single floats here: never a tile's operand
  const bf16* at;
  int64_t pixel;
  static void restore(float*) {}
};
#endif

// sums[row][kPanel] (+)= a^T b over `depth` words; `fresh`: sums hold nothing yet.
template <int kRows, class Word, class Panel>
void outer_tile(Operand<Word> a, Panel b, int64_t depth, int64_t chain, float* sums, bool fresh, Stream (&ahead)[2]) {
  Stream first = ahead[0], second = ahead[1];  // in registers
  RF_UNROLL for (int r = 0; r < kRows; ++r) {  // where dw is large its sums come from L3
    __builtin_prefetch(sums + r * kPanel, 1);
    __builtin_prefetch(sums + r * kPanel + kLanes, 1);
  }
  while (depth > 0) {
    Vec acc[kRows][2];
    RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
    const int64_t steps = smaller(depth, chain);
    for (int64_t i = 0; i < steps; ++i, a.next(), b.next()) {
      decltype(fetch(a.at)) b0, b1;
      b.load_panel(b0, b1);
      first.fetch();
      second.fetch();
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto v = spread(a.at + r);
        acc[r][0] = multiply_add(v, b0, acc[r][0]);
        acc[r][1] = multiply_add(v, b1, acc[r][1]);
      }
    }
    depth -= steps;
    RF_UNROLL for (int r = 0; r < kRows; ++r) {
      RF_UNROLL for (int n = 0; n < 2; ++n) {
        float* t = sums + r * kPanel + n * kLanes;
        store(t, fresh ? acc[r][n] : load(t) + acc[r][n]);
      }
    }
    fresh = false;
  }
  ahead[0] = first;
  ahead[1] = second;
}

template <class Word, class Panel>
struct OuterTiles {
  void (*at[kTileRows + 1])(Operand<Word>, Panel, int64_t, int64_t, float*, bool, Stream (&)[2]);
  template <int... I>
  static constexpr OuterTiles make(std::integer_sequence<int, I...>) {
    return {{nullptr, outer_tile<I + 1, Word, Panel>...}};
  }
};
template <class Word, class Panel = Operand<Word>>
constexpr OuterTiles<Word, Panel> kOuterTiles =
    OuterTiles<Word, Panel>::make(std::make_integer_sequence<int, kTileRows>());

}  // namespace RF_ISA
}  // namespace rf
