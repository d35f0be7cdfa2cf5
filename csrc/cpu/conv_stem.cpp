// "stem": three input channels (the 7x7 stride 2 of ImageNet, the 3x3 of CIFAR), NHWC or NCHW.
// 2*N*P*Q*K*R*S*3 flops. The S*3 floats of a filter row are one run of an NHWC row, and neighbouring outputs
// start 3*stride floats apart: from a padded row buffer the register tile reads its rows in place, with
// addresses fixed at compile time. The implicit GEMM's gather took as long as the arithmetic (45 % of peak).
// bf16 goes by pairs of neighbours in a filter row where the machine multiplies pairs; the odd one out is paired
// with zero, not with what follows it: that belongs to another window and may be NaN.
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kChannels = 3;

struct Plan {
  int64_t columns, row_elements, words, panels, block_rows;
  size_t buffer_bytes;
};

template <class Word>
Plan plan_of(const ConvShape& s, const ConvConfig& c) {
  Plan p;
  p.columns = (s.Q - 1) * s.stride_w + s.S;
  p.row_elements = p.columns * kChannels;
  p.words = s.R * ceil_div(s.S * kChannels, int64_t(WordOf<Word>::kElements));  // of one filter
  p.panels = ceil_div(s.K, int64_t(kPanel));
  p.block_rows = smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
  const int64_t rows = (p.block_rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
  p.buffer_bytes = odd_lines(size_t(rows * p.row_elements) * sizeof(typename WordOf<Word>::Element));
  return p;
}

const char* why_not(const ConvShape& s, DType) {
  if (s.C != kChannels || s.groups != 1) return "stem needs 3 input channels in one group";
  if (s.stride_w > 2) return "stem needs stride 1 or 2";
  if (s.dilation_w != 1) return "stem needs dilation 1";
  return nullptr;
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

template <class Word>
size_t packed_size(const ConvShape& s) {
  const Plan p = plan_of<Word>(s, {});
  return size_t(p.panels * p.words * kPanel) * sizeof(Word);
}

// packed: [panel][r][word of (s, c)][kPanel], zeros beyond K and in the second half of a row's odd last pair.
template <class Word>
void pack_words(const ConvShape& s, void* packed, const float* w, const float* fold) {
  constexpr int kElements = WordOf<Word>::kElements;
  auto* out = static_cast<typename WordOf<Word>::Element*>(packed);
  const int64_t run = s.S * kChannels;
  for (int64_t first = 0; first < s.K; first += kPanel) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t i = 0; i < run; i += kElements) {
        for (int64_t k = first; k < first + kPanel; ++k) {
          for (int64_t j = i; j < i + kElements; ++j) {
            const bool inside = k < s.K && j < run;
            const float* filter = w + (k * kChannels + j % kChannels) * s.R * s.S + r * s.S + j / kChannels;
            from_float(inside ? *filter * (fold ? fold[k] : 1.f) : 0.f, out++);
          }
        }
      }
    }
  }
}

size_t packed_bytes(const ConvShape& s, DType t) {
  return t == DType::f32 ? packed_size<float>(s) : packed_size<Bf16Word>(s);
}

void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int) {
  t == DType::f32 ? pack_words<float>(s, packed, w, fold) : pack_words<Bf16Word>(s, packed, w, fold);
}

size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
  return (t == DType::f32 ? plan_of<float>(s, c) : plan_of<Bf16Word>(s, c)).buffer_bytes * size_t(threads);
}

RF_INLINE Vec spread_word(const float* p) { return broadcast(*p); }
RF_INLINE Vec spread_first(const float* p) { return broadcast(*p); }
#if defined(__AVX512BF16__)
// Written out: g++ otherwise loads the words that neighbouring windows share once and keeps them, in registers the
// accumulators need, so that the tile spills and runs at half its rate.
RF_INLINE PairVec spread_word(const bf16* p) {
  __m512i v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const Pair*>(p)));
  return {(__m512bh)v};
}
RF_INLINE PairVec spread_first(const bf16* p) { return {(__m512bh)_mm512_set1_epi32(p->bits)}; }
#endif

// kRows neighbouring outputs, kStep elements apart in the row buffer; row_step elements between filter rows.
template <class Word, int kRows, int kStep>
void sum_row(const typename WordOf<Word>::Element* x, int64_t row_step, int64_t rows, int64_t run, const Word* w,
             float* sums) {
  constexpr int kElements = WordOf<Word>::kElements;
  Vec acc[kRows][2];
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  for (; rows > 0; --rows, x += row_step) {
    const auto* a = x;
#pragma GCC unroll 3
    for (int64_t i = run / kElements; i > 0; --i, a += kElements, w += kPanel) {
      const auto w0 = fetch(w), w1 = fetch(w + kLanes);
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto s = spread_word(a + r * kStep);
        acc[r][0] = multiply_add(s, w0, acc[r][0]);
        acc[r][1] = multiply_add(s, w1, acc[r][1]);
      }
    }
    if (run % kElements) {
      const auto w0 = fetch(w), w1 = fetch(w + kLanes);
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto s = spread_first(a + r * kStep);
        acc[r][0] = multiply_add(s, w0, acc[r][0]);
        acc[r][1] = multiply_add(s, w1, acc[r][1]);
      }
      w += kPanel;
    }
  }
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    store(sums + r * kPanel, acc[r][0]);
    store(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

template <class Word>
using SumRow = void (*)(const typename WordOf<Word>::Element*, int64_t, int64_t, int64_t, const Word*, float*);

template <class Word, int kStep>
SumRow<Word> pick(int64_t width) {
  if (width == kTileRows) return sum_row<Word, kTileRows, kStep>;
  return width == kTileRows / 2 ? sum_row<Word, kTileRows / 2, kStep> : sum_row<Word, 1, kStep>;
}

RF_INLINE void copy_element(float v, float* out) { *out = v; }
RF_INLINE void copy_element(bf16 v, float* out) { *out = to_float(v); }
RF_INLINE void copy_element(bf16 v, bf16* out) { *out = v; }

template <class T, class Word>
class Run {
  using Element = typename WordOf<Word>::Element;

 public:
  Run(const ConvArgs& args, const Team& team) : a_(args), s_(args.shape), p_(plan_of<Word>(args.shape, args.config)) {
    rows_ = reinterpret_cast<Element*>(static_cast<char*>(a_.scratch) + p_.buffer_bytes * size_t(team.rank));
    const Range mine = team.share(s_.N * s_.P);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t n = at / s_.P, p = at % s_.P;
      const int64_t end = smaller(smaller(p + p_.block_rows, s_.P), p + mine.end - at);
      copy_rows(n, {p, end});
      for (int64_t panel = 0; panel < p_.panels; ++panel) compute(n, {p, end}, panel);
      at += end - p;
    }
  }

 private:
  void copy_rows(int64_t n, Range out) {
    const int64_t first = out.begin * s_.stride_h - s_.pad_h;
    const int64_t last = (out.end - 1) * s_.stride_h - s_.pad_h + (s_.R - 1) * s_.dilation_h;
    const int64_t left = smaller(larger(s_.pad_w, int64_t(0)), p_.columns), inside = smaller(s_.W, p_.columns - left);
    Element* to = rows_;
    for (int64_t h = first; h <= last; ++h, to += p_.row_elements) {
      if (h < 0 || h >= s_.H) {
        std::memset(to, 0, size_t(p_.row_elements) * sizeof(Element));
        continue;
      }
      std::memset(to, 0, size_t(left * kChannels) * sizeof(Element));
      Element* pixel = to + left * kChannels;
      const T* x = static_cast<const T*>(a_.x);
      if (s_.planar) {
        const T* c0 = x + (n * kChannels * s_.H + h) * s_.W;
        const T *c1 = c0 + s_.H * s_.W, *c2 = c1 + s_.H * s_.W;
        for (int64_t w = 0; w < inside; ++w, pixel += kChannels) {
          copy_element(c0[w], pixel);
          copy_element(c1[w], pixel + 1);
          copy_element(c2[w], pixel + 2);
        }
      } else {
        const T* row = x + (n * s_.H + h) * s_.W * kChannels;
        int64_t i = 0;
        for (; i + kLanes <= inside * kChannels; i += kLanes) store(pixel + i, load(row + i));
        for (; i < inside * kChannels; ++i) copy_element(row[i], pixel + i);
        pixel += inside * kChannels;
      }
      std::memset(pixel, 0, size_t(to + p_.row_elements - pixel) * sizeof(Element));
    }
  }

  void compute(int64_t n, Range out, int64_t panel) {
    const int64_t width = s_.Q >= kTileRows ? kTileRows : s_.Q >= kTileRows / 2 ? kTileRows / 2 : 1;
    const SumRow<Word> sum = s_.stride_w == 2 ? pick<Word, 2 * kChannels>(width) : pick<Word, kChannels>(width);
    const Word* w = static_cast<const Word*>(a_.packed) + panel * p_.words * kPanel;
    for (int64_t p = out.begin; p < out.end; ++p) {
      const Element* row = rows_ + (p - out.begin) * s_.stride_h * p_.row_elements;
      for (int64_t done = 0; done < s_.Q;) {
        // The last tile is moved back to be full; what it computes again is not stored again.
        const int64_t q = smaller(done, s_.Q - width);
        alignas(64) float sums[kTileRows * kPanel];
        sum(row + q * s_.stride_w * kChannels, s_.dilation_h * p_.row_elements, s_.R, s_.S * kChannels, w, sums);
        finish_pixels(sums + (done - q) * kPanel, q + width - done, ((n * s_.P + p) * s_.Q + done) * s_.K,
                      panel * kPanel);
        done = q + width;
      }
    }
  }

  void finish_pixels(const float* sums, int64_t count, int64_t at, int64_t first) {
    for (int64_t k = first; k < smaller(first + kPanel, s_.K); k += kLanes) {
      const int n = int(smaller(s_.K - k, int64_t(kLanes)));
      const Vec scale = a_.scale ? load_n(a_.scale + k, n) : broadcast(1.f);
      const Vec shift = a_.shift ? load_n(a_.shift + k, n) : zero();
      T* y = static_cast<T*>(a_.y) + at + k;
      const T* residual = a_.residual ? static_cast<const T*>(a_.residual) + at + k : nullptr;
      for (int64_t i = 0; i < count; ++i, y += s_.K) {
        Vec v = fma(load(sums + i * kPanel + k - first), scale, shift);
        if (residual) v = v + load_n(residual + i * s_.K, n);
        if (a_.relu) v = relu(v);
        n == kLanes ? store(y, v) : store_n(y, v, n);
      }
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  Element* rows_;
};

void run(const ConvArgs& a, const Team& team) {
  if (a.dtype == DType::f32) {
    Run<float, float>(a, team);
  } else {
    Run<bf16, Bf16Word>(a, team);
  }
}

}  // namespace

extern const Algorithm kStem;
const Algorithm kStem = {"stem", 1, 1, why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
