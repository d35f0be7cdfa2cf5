// The data gradient of a convolution on the CPU, any stride and dilation, without a wasted tap.
// Input pixels fall into stride_h * stride_w residue classes; inside one every pixel is reached by the same taps, at
// fixed offsets in dy. So each class is a small dense convolution of dy: 2*N*P*Q*K*R*S*C flops in all, where a
// convolution over dy stretched with zeros does stride^2 times that. Classes no tap reaches are zeros.
// Blocks of pixels are gathered into gemm.h's tiles as conv_direct does; a tile's sums go to dx pixel by pixel,
// because neighbours of a class lie `stride` apart. Stride 1 is one class; Winograd on flipped filters beats it at 3x3.
// Groups one after another; those that share a vector are dgrad_grouped.cpp's.
#include "../workspace.h"
#include "conv_direct.h"
#include "grouped.h"
#include "row_shares.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kMostTaps = 64;  // of one class
constexpr int64_t kBlockBytes = 256 << 10;

// Input pixels first + i * stride, i < count, and their taps: output pixel i + offset[t] through filter tap[t].
struct Axis {
  int64_t count = 0;
  int taps = 0;
  int64_t tap[kMostTaps], offset[kMostTaps];
};

Axis axis_of(int64_t first, int64_t size, int64_t filter, int64_t stride, int64_t pad, int64_t dilation) {
  Axis axis;
  axis.count = size > first ? ceil_div(size - first, stride) : 0;
  for (int64_t t = 0; t < filter; ++t) {
    const int64_t reach = first + pad - t * dilation;
    if (reach % stride != 0) continue;
    axis.tap[axis.taps] = t;
    axis.offset[axis.taps++] = reach / stride;
  }
  return axis;
}

template <class Word>
struct Class {
  int64_t h0, w0;
  Axis h, w;
  int64_t filters, channels, panels;  // of a group
  int64_t rows, chunks, words;
  Class(const ConvShape& s, int64_t h0_, int64_t w0_) : h0(h0_), w0(w0_) {
    h = axis_of(h0, s.H, s.R, s.stride_h, s.pad_h, s.dilation_h);
    w = axis_of(w0, s.W, s.S, s.stride_w, s.pad_w, s.dilation_w);
    filters = s.K / s.groups, channels = s.C / s.groups;
    panels = ceil_div(channels, int64_t(kPanel));
    rows = s.N * h.count * w.count;
    chunks = ceil_div(int64_t(h.taps * w.taps) * filters, int64_t(kChunk<Word>));
    words = chunks * kLanes;
  }
};

// kPanel words of depth from one filter's channels, or from two filters'.
RF_INLINE void put_words(float* to, const float* w, int64_t) {
  store(to, load(w));
  store(to + kLanes, load(w + kLanes));
}
#if defined(__AVX512BF16__)
RF_INLINE void put_words(Pair* to, const float* w, int64_t next) {
  for (int c = 0; c < kPanel; c += kLanes) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(load(w + c).v)),
                  high = _mm512_cvtepu16_epi32(narrow(load(w + next + c).v));
    _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

// The class's filters as [panel of a group's input channels][word of (tap, k)][kPanel], zeros beyond.
template <class Word>
void pack_panel(const DgradArgs& a, const Class<Word>& k, int64_t panel, Word* packed) {
  using Element = typename WordOf<Word>::Element;
  constexpr int kElements = WordOf<Word>::kElements;
  const int64_t group = panel / k.panels, c0 = panel % k.panels * kPanel;
  const int cols = int(smaller(int64_t(kPanel), k.channels - c0));
  Element* out = reinterpret_cast<Element*>(packed + panel * k.words * kPanel);
  const int64_t depth = int64_t(k.h.taps * k.w.taps) * k.filters;
  std::memset(out + depth / kElements * kPanel * kElements, 0,
              size_t(k.words * kElements - depth / kElements * kElements) * kPanel * sizeof(Element));
  if (cols < kPanel) std::memset(out, 0, size_t(k.words) * kPanel * kElements * sizeof(Element));
  int64_t d = 0;
  for (int i = 0; i < k.h.taps; ++i) {
    for (int j = 0; j < k.w.taps; ++j) {
      const float* w =
          a.w + group * k.filters * a.stride_k + k.h.tap[i] * a.stride_r + k.w.tap[j] * a.stride_s + c0 * a.stride_c;
      for (int64_t n = 0; n < k.filters; ++n, ++d, w += a.stride_k) {
        Element* to = out + d / kElements * kPanel * kElements + d % kElements;
        if (a.stride_c == 1 && cols == kPanel && d % kElements == 0 && n + kElements <= k.filters) {
          put_words(reinterpret_cast<Word*>(to), w, a.stride_k);
          n += kElements - 1, d += kElements - 1, w += (kElements - 1) * a.stride_k;
        } else {
          for (int c = 0; c < cols; ++c) from_float(w[c * a.stride_c], to + c * kElements);
        }
      }
    }
  }
}

// Pixel `row` of the class, then its successors: divisions a row would cost as much as the scatter.
struct Pixel {
  int64_t rows, cols, n, i, j;
  template <class Word>
  Pixel(const Class<Word>& k, int64_t row)
      : rows(k.h.count), cols(k.w.count), n(row / cols / rows), i(row / cols % rows), j(row % cols) {}
  RF_INLINE void next() {
    if (++j < cols) return;
    j = 0;
    if (++i < rows) return;
    i = 0, ++n;
  }
};

// Rows [begin, end) of one tile: each pixel's reachable dy vectors in depth order, zeros where dy ends.
template <class T, class Word>
void gather_tile(const ConvShape& s, const Class<Word>& k, const T* dy, int64_t begin, int64_t end, Word* tile) {
  using Element = typename WordOf<Word>::Element;
  Pixel at(k, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    RowWriter<T, Word> writer(reinterpret_cast<Element*>(tile) + (row - begin) * kChunk<Word>,
                              (end - begin) * kChunk<Word>);
    for (int i = 0; i < k.h.taps; ++i) {
      const int64_t p = at.i + k.h.offset[i];
      for (int j = 0; j < k.w.taps; ++j) {
        const int64_t q = at.j + k.w.offset[j];
        if (p < 0 || p >= s.P || q < 0 || q >= s.Q)
          writer.zeros(k.filters);
        else
          writer.copy(dy + ((at.n * s.P + p) * s.Q + q) * s.K, k.filters);
      }
    }
    writer.finish();
  }
}

// Sums, rows kPanel apart (null: zeros), to their pixels of dx.
template <class T, class Word>
void scatter_tile(const ConvShape& s, const Class<Word>& k, T* dx, int64_t begin, int64_t end, int64_t c0, int64_t c1,
                  const float* sums) {
  Pixel at(k, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    T* out = dx + ((at.n * s.H + k.h0 + at.i * s.stride_h) * s.W + k.w0 + at.j * s.stride_w) * s.C;
    const float* in = sums ? sums + (row - begin) * kPanel : nullptr;
    for (int64_t c = c0; c < c1; c += kLanes) {
      const Vec v = in ? load(in + (c - c0)) : zero();
      if (c + kLanes <= c1)
        store(out + c, v);
      else
        store_n(out + c, v, int(c1 - c));
    }
  }
}

template <class T, class Word>
void run_class(const DgradArgs& a, const Class<Word>& k, const Team& team, Word* packed, Word* block,
               int64_t block_rows) {
  if (k.rows == 0) return;  // fewer rows or columns than the stride: no input pixel is in this class
  const ConvShape& s = a.shape;
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const RowShares shares(team, k.rows, 0, block_rows);
  if (k.chunks == 0) {
    const Range mine = shares.of(team.rank);
    scatter_tile(s, k, dx, mine.begin, mine.end, 0, s.C, nullptr);
    return;
  }
  team.each(s.groups * k.panels, [&](int64_t panel) { pack_panel(a, k, panel, packed); });
  team.sync();
  const int64_t panel_words = k.words * kPanel;
  const auto pieces = [&](int owner) { return shares.pieces(owner); };
  team.each_piece(pieces, [&](int owner, int64_t i) {
    const Range rows = shares.piece(owner, i);
    const int64_t begin = rows.begin, end = rows.end;
    alignas(64) float sums[kTileRows * kPanel];
    const TileRows tiles(end - begin);
    for (int64_t group = 0; group < s.groups; ++group) {
      const Word* filters = packed + group * k.panels * panel_words;
      for (int64_t t = 0; t < tiles.tiles; ++t)
        gather_tile(s, k, dy + group * k.filters, begin + tiles.first(t), begin + tiles.first(t + 1),
                    block + tiles.first(t) * k.words);
      Ahead ahead;
      ahead.weights_step = Ahead::step(panel_words * int64_t(sizeof(Word)), tiles.tiles * k.words);
      for (int64_t panel = 0; panel < k.panels; ++panel) {
        const int64_t c0 = panel * kPanel, c1 = smaller(c0 + kPanel, k.channels);
        ahead.weights = reinterpret_cast<const char*>(filters + (panel + 1) % k.panels * panel_words);
        for (int64_t t = 0; t < tiles.tiles; ++t) {
          const int64_t first = tiles.first(t), last = tiles.first(t + 1);
          kSumTiles<Word>.at[last - first](block + first * k.words, filters + panel * panel_words, k.chunks, sums,
                                           ahead);
          scatter_tile(s, k, dx + group * k.channels, begin + first, begin + last, c0, c1, sums);
        }
      }
    }
  });
  team.sync();  // the next class packs over these filters
}

template <class T, class Word>
void dgrad_any(const DgradArgs& a) {
  const ConvShape& s = a.shape;
  int64_t most_words = 0, most_rows = kTileRows;
  for (int64_t h = 0; h < s.stride_h; ++h)
    for (int64_t w = 0; w < s.stride_w; ++w) most_words = larger(most_words, Class<Word>(s, h, w).words);
  const int64_t fit = kBlockBytes / int64_t(sizeof(Word)) / larger(most_words, int64_t(1));
  most_rows = larger(fit / kTileRows * kTileRows, most_rows);
  const int64_t panels = s.groups * ceil_div(s.C / s.groups, int64_t(kPanel));
  const int64_t packed_floats = panels * most_words * kPanel * int64_t(sizeof(Word)) / 4;
  const int64_t block_floats = most_rows * most_words * int64_t(sizeof(Word)) / 4 + 16;
  const Workspace work(size_t(packed_floats + a.threads * block_floats) * 4);
  parallel(a.threads, [&](const Team& team) {
    Word* packed = reinterpret_cast<Word*>(work.floats());
    Word* block = reinterpret_cast<Word*>(work.floats() + packed_floats + team.rank * block_floats);
    for (int64_t h = 0; h < s.stride_h; ++h)
      for (int64_t w = 0; w < s.stride_w; ++w)
        run_class<T, Word>(a, Class<Word>(s, h, w), team, packed, block, most_rows);
  });
}

}  // namespace

const char* dgrad_why_not(const ConvShape& s, DType) {
  if (!dgrad_grouped_why_not(s)) return nullptr;
  if (const char* reason = narrow_groups_why_not(s)) return reason;
  if (s.R > kMostTaps || s.S > kMostTaps) return "filters of more than 64 rows or columns are left to torch";
  return nullptr;
}

void dgrad(const DgradArgs& a) {
  if (!dgrad_grouped_why_not(a.shape)) return dgrad_grouped(a);
  a.dtype == DType::f32 ? dgrad_any<float, float>(a) : dgrad_any<bf16, Bf16Word>(a);
}

}  // namespace RF_ISA
}  // namespace rf
