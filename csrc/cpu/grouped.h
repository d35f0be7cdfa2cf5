// What the kernels of grouped convolutions with as many filters as channels share: rows copied to buffers of one vector
// of channels side by side, and the register tile of the forward and of the data gradient.
// A vector holds whole groups; word j of each group is spread over the group's lanes by one permutation. A word is a
// float, or where vdpbf16ps multiplies bf16 pairs of channels two of them, half a permutation and half a multiply-add
// each.
#pragma once
#include "../conv_backward.h"
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

const char* wgrad_grouped_why_not(const ConvShape&);
void wgrad_grouped(const WgradArgs&);
const char* dgrad_grouped_why_not(const ConvShape&);
void dgrad_grouped(const DgradArgs&);
void pack_grouped(const PackStridedArgs&, const Team&);

// Groups whose channels leave most of a panel of the dense kernels empty.
RF_INLINE const char* narrow_groups_why_not(const ConvShape& s) {
  if (s.groups == 1 || s.C / s.groups >= kPanel / 2) return nullptr;
  return "narrow groups are left to torch, unless a vector holds whole ones of as many filters as channels";
}

// Whether the channels of a group are multiplied as pairs of bf16.
RF_INLINE bool grouped_pairs(const ConvShape& s, DType t) {
  return sizeof(WordOf<Bf16Word>::Element) == sizeof(bf16) && t == DType::bf16 && s.C / s.groups % 2 == 0;
}

template <class Word>
constexpr int kPixelWords = kLanes / WordOf<Word>::kElements;  // of one pixel in a buffer

RF_INLINE Vec load_pixel(const float* p) { return load(p); }
template <class T>
RF_INLINE void put_pixel(float* to, const T* from) {
  store(to, load(from));
}
template <class T>
RF_INLINE void put_pixel(float* to, const T* from, int channels) {
  store(to, load_n(from, channels));
}
RF_INLINE void put_zeros(float* to) { store(to, zero()); }
#if defined(__AVX512BF16__)
RF_INLINE PairVec load_pixel(const Pair* p) {
  return {(__m512bh)_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p))};
}
RF_INLINE PairVec permute(PairVec a, Lanes from) { return {(__m512bh)_mm512_permutexvar_epi32(from.v, (__m512i)a.v)}; }
RF_INLINE void put_pixel(Pair* to, const bf16* from) {
  _mm256_storeu_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
}
RF_INLINE void put_pixel(Pair* to, const bf16* from, int channels) {
  _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16(first(channels), from));
}
RF_INLINE void put_zeros(Pair* to) { _mm256_storeu_si256((__m256i*)to, _mm256_setzero_si256()); }
#endif

// Columns [first, first + count) of an image's row, whose pixels lie `width` elements apart: one vector of `channels`
// channels of each; zeros beside the image.
template <class T, class Word>
void copy_columns(Word* to, const T* row, int64_t size, int64_t width, int64_t first, int64_t count, int channels) {
  const int64_t begin = smaller(larger(-first, int64_t(0)), count);
  const int64_t end = larger(smaller(size - first, count), begin);
  int64_t i = 0;
  for (; i < begin; ++i, to += kPixelWords<Word>) put_zeros(to);
  const T* from = row + (first + begin) * width;
  if (channels == kLanes) {
    for (; i < end; ++i, to += kPixelWords<Word>, from += width) put_pixel(to, from);
  } else {
    for (; i < end; ++i, to += kPixelWords<Word>, from += width) put_pixel(to, from, channels);
  }
  for (; i < count; ++i, to += kPixelWords<Word>) put_zeros(to);
}

// The sums of a tile: R rows of S taps of the words of a group each.
struct TileTaps {
  int64_t R, S;
  int per_group;            // channels
  int64_t pixel, tap, row;  // words of the buffer from one to the next
};

// How taps of a row lie. A permuted pixel feeds all taps that are neighbours: one step of the tile's pixels apart.
enum class TapRow { any, two, three, three_by_2 };  // the last: at stride 2 the outer two are, the middle one is not

template <class Word>
TapRow tap_row(const TileTaps& t) {
  constexpr int64_t kOne = kPixelWords<Word>;
  if (t.tap != kOne) return TapRow::any;
  if (t.pixel == 2 * kOne && t.S == 3) return TapRow::three_by_2;
  return t.pixel != kOne ? TapRow::any : t.S == 3 ? TapRow::three : t.S == 2 ? TapRow::two : TapRow::any;
}

// acc[i] += pixel i + k of x * filter k.
template <int kTaps, bool kDepthwise, int kPixels, class Word>
RF_INLINE void add_taps(Vec (&acc)[kPixels], const Word* x, int64_t pixel, Lanes lanes, const Word* w, int64_t tap) {
  decltype(fetch(w)) filter[kTaps];
  RF_UNROLL for (int k = 0; k < kTaps; ++k) filter[k] = fetch(w + k * tap);
  RF_UNROLL for (int i = 0; i < kPixels + kTaps - 1; ++i) {
    auto value = load_pixel(x + i * pixel);
    if (!kDepthwise) value = permute(value, lanes);
    RF_UNROLL for (int k = 0; k < kTaps; ++k) {
      if (i - k >= 0 && i - k < kPixels) acc[i - k] = multiply_add(value, filter[k], acc[i - k]);
    }
  }
}

// sums[i] of kPixels neighbours; w: [row][word of a group][tap][lane].
template <int kPixels, TapRow kRow, bool kDepthwise, class Word>
void sum_pixels(const TileTaps& t, const Word* x, const Word* w, float* sums) {
  constexpr int kElements = WordOf<Word>::kElements;
  Vec acc[kPixels];
  RF_UNROLL for (int i = 0; i < kPixels; ++i) acc[i] = zero();
  alignas(64) int32_t from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = (lane & -t.per_group) / kElements;  // the group's first word
  const Lanes first = load_lanes(from);
  for (int64_t r = 0; r < t.R; ++r, x += t.row) {
    Lanes lanes = first;
    for (int j = 0; j < t.per_group; j += kElements, lanes = next(lanes)) {
      if constexpr (kRow == TapRow::three) {
        add_taps<3, kDepthwise>(acc, x, kPixelWords<Word>, lanes, w, kLanes);
      } else if constexpr (kRow == TapRow::two) {
        add_taps<2, kDepthwise>(acc, x, kPixelWords<Word>, lanes, w, kLanes);
      } else if constexpr (kRow == TapRow::three_by_2) {
        add_taps<2, kDepthwise>(acc, x, 2 * kPixelWords<Word>, lanes, w, 2 * kLanes);
        add_taps<1, kDepthwise>(acc, x + kPixelWords<Word>, 2 * kPixelWords<Word>, lanes, w + kLanes, kLanes);
      } else {
        const Word* tap = x;
        for (int64_t i = 0; i < t.S; ++i, tap += t.tap)
          add_taps<1, kDepthwise>(acc, tap, t.pixel, lanes, w + i * kLanes, kLanes);
      }
      w += t.S * kLanes;
    }
  }
  RF_UNROLL for (int i = 0; i < kPixels; ++i) store(sums + i * kLanes, acc[i]);
}

template <class Word>
using SumPixels = void (*)(const TileTaps&, const Word*, const Word*, float*);

template <int kPixels, bool kDepthwise, class Word>
SumPixels<Word> pick_row(TapRow row) {
  switch (row) {
    case TapRow::three:
      return sum_pixels<kPixels, TapRow::three, kDepthwise, Word>;
    case TapRow::two:
      return sum_pixels<kPixels, TapRow::two, kDepthwise, Word>;
    case TapRow::three_by_2:
      return sum_pixels<kPixels, TapRow::three_by_2, kDepthwise, Word>;
    default:
      return sum_pixels<kPixels, TapRow::any, kDepthwise, Word>;
  }
}
template <int kPixels, class Word>
SumPixels<Word> pick_tile(const TileTaps& t) {
  if constexpr (WordOf<Word>::kElements == 1) {
    if (t.per_group == 1) return pick_row<kPixels, true, Word>(tap_row<Word>(t));
  }
  return pick_row<kPixels, false, Word>(tap_row<Word>(t));
}

// Calls finish(sums, first, count) for the tiles of a row of `width` pixels from x on.
template <class Word>
struct TileRow {
  static constexpr int kMany = kTileRows, kSome = kTileRows / 2;
  const TileTaps taps;
  const int64_t width, tile;
  const SumPixels<Word> sum;
  TileRow(const TileTaps& t, int64_t row_width)
      : taps(t),
        width(row_width),
        tile(width >= kMany   ? kMany
             : width >= kSome ? kSome
                              : 1),
        sum(tile == kMany   ? pick_tile<kMany, Word>(t)
            : tile == kSome ? pick_tile<kSome, Word>(t)
                            : pick_tile<1, Word>(t)) {}
  template <class Finish>
  void run(const Word* x, const Word* w, const Finish& finish) const {
    alignas(64) float sums[kMany * kLanes];
    for (int64_t done = 0; done < width;) {
      // The last tile is moved back to be full; what it computes again is not stored again.
      const int64_t at = smaller(done, width - tile);
      sum(taps, x + at * taps.pixel, w, sums);
      finish(sums + (done - at) * kLanes, done, at + tile - done);
      done = at + tile;
    }
  }
};

}  // namespace RF_ISA
}  // namespace rf
