// "direct": any convolution as an implicit GEMM, rows = output pixels, depth = (r, s, c), columns = output channels.
// 2*N*P*Q*K*R*S*C/groups flops. A block of pixels is gathered into packed tiles in L2 (zeros where the filter
// leaves the image), then every panel of weights sweeps the block: the gather costs one copy of a vector per K
// multiply-adds of it, 1-5 %, and makes stride, dilation, odd channel counts and bf16 the same case.
// Each output element is one chain of multiply-adds in depth order, whatever the blocks and threads.
#pragma once
#include "conv_algorithms.h"
#include "moments.h"
#include "row_shares.h"

namespace rf {
namespace RF_ISA {

struct DirectPlan {
  int64_t rows, cols, depth, channels;  // per group
  int64_t chunks, words, panels;        // depth rounded up to whole chunks
};

template <class Word>
RF_INLINE DirectPlan direct_plan(const ConvShape& s) {
  DirectPlan p;
  p.rows = s.N * s.P * s.Q;
  p.cols = s.K / s.groups;
  p.channels = s.C / s.groups;
  p.depth = depth_of(s);
  p.chunks = ceil_div(p.depth, int64_t(kChunk<Word>));
  p.words = p.chunks * kLanes;
  p.panels = ceil_div(p.cols, int64_t(kPanel));
  return p;
}

template <class Word>
size_t direct_packed_bytes(const ConvShape& s) {
  const DirectPlan p = direct_plan<Word>(s);
  return size_t(s.groups * p.panels * p.words * kPanel) * sizeof(Word);
}

// packed: [group][panel][word][kPanel], zeros beyond the depth and the columns.
template <class Word>
void direct_pack(const ConvShape& s, void* packed, const float* w, const float* fold, int threads) {
  using Element = typename WordOf<Word>::Element;
  constexpr int kElements = WordOf<Word>::kElements;
  const DirectPlan p = direct_plan<Word>(s);
  const int64_t panel_elements = p.words * kPanel * kElements;
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(s.groups * p.panels);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      Element* out = static_cast<Element*>(packed) + i * panel_elements;
      std::memset(out, 0, size_t(panel_elements) * sizeof(Element));
      const int64_t first = i % p.panels * kPanel, cols = smaller(int64_t(kPanel), p.cols - first);
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t k = i / p.panels * p.cols + first + j;
        const float* filter = w + k * p.depth;
        const float factor = fold ? fold[k] : 1.f;
        for (int64_t c = 0; c < p.channels; ++c) {
          for (int64_t t = 0; t < s.R * s.S; ++t) {
            const int64_t d = t * p.channels + c;
            from_float(filter[c * s.R * s.S + t] * factor,
                       out + (d / kElements * kPanel + j) * kElements + d % kElements);
          }
        }
      }
    }
  });
}

RF_INLINE void copy_chunk(float* to, const float* x) { store(to, load(x)); }
RF_INLINE void copy_chunk(float* to, const bf16* x) { store(to, load(x)); }
RF_INLINE void copy_chunk(bf16* to, const bf16* x) { std::memcpy(to, x, sizeof(bf16) * kChunk<Bf16Word>); }

// One pixel's elements, appended in depth order to its row of a packed tile.
template <class T, class Word>
class RowWriter {
  using Element = typename WordOf<Word>::Element;
  static constexpr int kWide = kChunk<Word>;

 public:
  RF_INLINE RowWriter(Element* row, int64_t chunk_stride) : at_(row), stride_(chunk_stride) {}

  RF_INLINE void copy(const T* x, int64_t n) {
    while (n > 0) {
      if (used_ == 0 && n >= kWide) {
        copy_chunk(at_, x);
        at_ += stride_;
        x += kWide;
        n -= kWide;
        continue;
      }
      const int step = int(smaller(n, int64_t(kWide - used_)));
      copy_part(at_ + used_, x, step);
      advance(step);
      x += step;
      n -= step;
    }
  }
  RF_INLINE void zeros(int64_t n) {
    while (n > 0) {
      const int step = int(smaller(n, int64_t(kWide - used_)));
      std::memset(at_ + used_, 0, size_t(step) * sizeof(Element));
      advance(step);
      n -= step;
    }
  }
  RF_INLINE void finish() {
    if (used_) zeros(kWide - used_);
  }

 private:
  RF_INLINE void advance(int step) {
    used_ += step;
    if (used_ == kWide) {
      used_ = 0;
      at_ += stride_;
    }
  }
  static RF_INLINE void copy_part(float* to, const T* x, int n) { store_n(to, load_n(x, n), n); }
  static RF_INLINE void copy_part(bf16* to, const T* x, int n) { std::memcpy(to, x, sizeof(bf16) * size_t(n)); }

  Element* at_;
  int64_t stride_;
  int used_ = 0;
};

// Where the rows of one tile read: the image, and the input pixel under the filter's first tap.
template <class T>
struct TileRead {
  const T* image[kTileRows];
  int64_t h[kTileRows], w[kTileRows];
};

// Whole chunks of channels: tap by tap, every store next to the last.
template <class T, class Word>
void gather_chunks(const ConvShape& s, int64_t channels, const TileRead<T>& from, int64_t height,
                   typename WordOf<Word>::Element* to) {
  constexpr int kWide = kChunk<Word>;
  for (int64_t dr = 0; dr < s.R; ++dr) {
    for (int64_t ds = 0; ds < s.S; ++ds) {
      const T* pixel[kTileRows];
      for (int64_t r = 0; r < height; ++r) {
        const int64_t h = from.h[r] + dr * s.dilation_h, w = from.w[r] + ds * s.dilation_w;
        const bool inside = h >= 0 && h < s.H && w >= 0 && w < s.W;
        pixel[r] = inside ? from.image[r] + (h * s.W + w) * s.C : nullptr;
      }
      for (int64_t c = 0; c < channels; c += kWide) {
        for (int64_t r = 0; r < height; ++r, to += kWide) {
          if (pixel[r]) {
            copy_chunk(to, pixel[r] + c);
          } else {
            std::memset(to, 0, sizeof(*to) * kWide);
          }
        }
      }
    }
  }
}

// Whole chunks of channels of 1x1 filters' pixels, normalised and rectified on their way.
template <class T, class Word>
void gather_normalised(const ConvShape& s, const ConvNorm& norm, const TileRead<T>& from, int64_t height,
                       typename WordOf<Word>::Element* to) {
  for (int64_t c = 0; c < s.C; c += kChunk<Word>) {
    for (int64_t r = 0; r < height; ++r, to += kChunk<Word>) {
      const T* pixel = from.image[r] + (from.h[r] * s.W + from.w[r]) * s.C + c;
      for (int i = 0; i < kChunk<Word>; i += kLanes) {
        const Vec x = load(pixel + i) - load(norm.mean + c + i);
        store(to + i, relu(fma(x, load(norm.scale + c + i), load(norm.beta + c + i))));
      }
    }
  }
}

// Any number of channels: pixel by pixel, a row of the filter as one run where it is one in memory.
template <class T, class Word>
void gather_runs(const ConvShape& s, int64_t channels, const TileRead<T>& from, int64_t height,
                 typename WordOf<Word>::Element* to) {
  const bool runs = s.dilation_w == 1 && s.groups == 1;
  for (int64_t r = 0; r < height; ++r) {
    RowWriter<T, Word> row(to + r * kChunk<Word>, height * kChunk<Word>);
    const int64_t w0 = from.w[r];
    for (int64_t dr = 0; dr < s.R; ++dr) {
      const int64_t h = from.h[r] + dr * s.dilation_h;
      if (h < 0 || h >= s.H) {
        row.zeros(s.S * channels);
        continue;
      }
      const T* line = from.image[r] + h * s.W * s.C;
      if (runs) {
        const int64_t left = smaller(larger(-w0, int64_t(0)), s.S);
        const int64_t stop = smaller(larger(s.W - w0, left), s.S);
        row.zeros(left * s.C);
        row.copy(line + (w0 + left) * s.C, (stop - left) * s.C);
        row.zeros((s.S - stop) * s.C);
      } else {
        for (int64_t ds = 0; ds < s.S; ++ds) {
          const int64_t w = w0 + ds * s.dilation_w;
          w < 0 || w >= s.W ? row.zeros(channels) : row.copy(line + w * s.C, channels);
        }
      }
    }
    row.finish();
  }
}

// Gathers rows [begin, end) of the implicit matrix for one group into packed tiles.
template <class T, class Word>
void direct_gather(const ConvShape& s, const DirectPlan& p, const T* x, const ConvNorm& norm, int64_t group,
                   int64_t begin, int64_t end, Word* block) {
  using Element = typename WordOf<Word>::Element;
  const TileRows tiles(end - begin);
  const auto gather = p.channels % kChunk<Word> == 0 ? gather_chunks<T, Word> : gather_runs<T, Word>;
  int64_t q = begin % s.Q, i = begin / s.Q % s.P;
  const T* image = x + group * p.channels + begin / s.Q / s.P * s.H * s.W * s.C;
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
    TileRead<T> from;
    for (int64_t r = 0; r < height; ++r) {
      from.image[r] = image;
      from.h[r] = i * s.stride_h - s.pad_h;
      from.w[r] = q * s.stride_w - s.pad_w;
      if (++q == s.Q) {
        q = 0;
        if (++i == s.P) i = 0, image += s.H * s.W * s.C;
      }
    }
    Element* to = reinterpret_cast<Element*>(block + first * p.words);
    if constexpr (sizeof(Element) == sizeof(T)) {
      if (norm.mean) {
        gather_normalised<T, Word>(s, norm, from, height, to);
        continue;
      }
    }
    gather(s, p.channels, from, height, to);
  }
}

// What the next block will touch, in the order it will: its input, then what its tiles write and add. A piece of it is
// fetched with every tile, line after line: a tile's own rows lie a row of y apart, no two lines together, and waiting
// for them took a third of 64->256 at 56x56.
class Upcoming {
 public:
  template <class T>
  void add(const T* at, int64_t elements) {
    ranges_[count_++] = {reinterpret_cast<const char*>(at), elements * int64_t(sizeof(T))};
    bytes_ += elements * int64_t(sizeof(T));
  }
  void share(int64_t tiles) { piece_ = ceil_div(bytes_, larger(tiles - count_, int64_t(1))); }
  RF_INLINE void fetch(Ahead& ahead, int64_t words) {
    while (first_ < count_ && ranges_[first_].bytes <= 0) ++first_;
    Piece& from = ranges_[first_];
    ahead.data = from.at;
    ahead.data_step = Ahead::step(smaller(piece_, from.bytes), words);
    from.at += piece_;
    from.bytes -= piece_;
  }

 private:
  struct Piece {
    const char* at = nullptr;
    int64_t bytes = 0;
  };
  Piece ranges_[4];  // the last stays empty
  int count_ = 0, first_ = 0;
  int64_t bytes_ = 0, piece_ = 0;
};

// Rows [begin, end) as the next block: the input that they are the first to read is what lies under their filter's last
// row.
template <class T>
Upcoming direct_upcoming(const ConvArgs& a, int64_t begin, int64_t end) {
  Upcoming up;
  if (begin >= end) return up;
  const ConvShape& s = a.shape;
  const auto pixel = [&](int64_t row) {
    const int64_t h = row / s.Q % s.P * s.stride_h - s.pad_h + (s.R - 1) * s.dilation_h;
    return (row / s.Q / s.P * s.H + smaller(h, s.H - 1)) * s.W + smaller(row % s.Q * s.stride_w, s.W - 1);
  };
  const int64_t first = pixel(begin), last = pixel(end - 1) + 1;
  up.add(static_cast<const T*>(a.x) + first * s.C, (last - first) * s.C);
  if (a.residual) up.add(static_cast<const T*>(a.residual) + begin * s.K, (end - begin) * s.K);
  up.add(static_cast<const T*>(a.y) + begin * s.K, (end - begin) * s.K);
  return up;
}

// Panels [from, to) of one group over the gathered rows.
template <class T, class Word>
void direct_multiply(const ConvArgs& a, const DirectPlan& p, int64_t group, int64_t begin, int64_t end, int64_t from,
                     int64_t to, const Word* block, Upcoming& up) {
  const TileRows tiles(end - begin);
  const ConvShape& s = a.shape;
  Ahead ahead;
  ahead.weights_step = Ahead::step(p.words * kPanel * int64_t(sizeof(Word)), tiles.tiles * p.words);
  for (int64_t panel = from; panel < to; ++panel) {
    const Word* weights = static_cast<const Word*>(a.packed) + (group * p.panels + panel) * p.words * kPanel;
    ahead.weights = reinterpret_cast<const char*>(
        weights + (panel + 1 < to ? p.words * kPanel : (from - panel) * p.words * kPanel));
    const int64_t k = group * p.cols + panel * kPanel;
    Epilogue<T> e;
    e.scale = a.scale ? a.scale + k : nullptr;
    e.shift = a.shift ? a.shift + k : nullptr;
    e.stride = s.K;
    e.cols = int(smaller(int64_t(kPanel), p.cols - panel * kPanel));
    e.relu = a.relu;
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
      const int64_t at = (begin + first) * s.K + k;
      e.y = static_cast<T*>(a.y) + at;
      e.residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
      up.fetch(ahead, p.words);
      kConvTiles<Word, T>.at[height](block + first * p.words, weights, p.chunks, e, ahead);
    }
  }
}

template <class Word>
RF_INLINE int64_t direct_block_rows(const ConvShape& s, const ConvConfig& c, const DirectPlan& p) {
  // Two tiles' rows, and of few channels as many as 56 KB hold, twelve tiles' at most: fewer reread the weights, more
  // leave L2, and between 14 and 56 rows of 256 channels and more nothing changes by 5 %. 1x1 filters on two cores with
  // two L3s, 28 rows and these: 56x56, 64 to 256, 319 and 394 GFLOP/s, 28x28, 128 to 512, 415 and 454.
  constexpr int64_t kBlockBytes = 56 << 10, kMostTiles = 12;
  const int64_t fit = kBlockBytes / (p.words * int64_t(sizeof(Word)) * kTileRows);
  const int64_t tiles = larger(smaller(fit, kMostTiles), int64_t(2));
  return smaller(c.block_rows > 0 ? int64_t(c.block_rows) : tiles * kTileRows, p.rows);
}

template <class Word>
size_t direct_scratch_bytes(const ConvShape& s, const ConvConfig& c, int threads) {
  const DirectPlan p = direct_plan<Word>(s);
  const size_t block = odd_lines(size_t(direct_block_rows<Word>(s, c, p) * p.words) * sizeof(Word));
  return c.split_cols && s.groups == 1 ? block : block * size_t(threads);
}

template <class T, class Word>
void direct_run(const ConvArgs& a, const Team& team) {
  const ConvShape& s = a.shape;
  const DirectPlan p = direct_plan<Word>(s);
  const int64_t block_rows = direct_block_rows<Word>(s, a.config, p);
  const int64_t block_panels =
      a.config.block_cols > 0 ? ceil_div(int64_t(a.config.block_cols), int64_t(kPanel)) : p.panels;
  const T* x = static_cast<const T*>(a.x);
  char* scratch = static_cast<char*>(a.scratch);

  if (a.config.split_cols && s.groups == 1) {
    // The team gathers each block together; every thread then runs its own panels over all of it.
    Word* block = reinterpret_cast<Word*>(scratch);
    const Range mine = team.share(p.panels);
    const int64_t step = Blocks(p.rows, block_rows).step;
    for (int64_t begin = 0; begin < p.rows; begin += step) {
      const int64_t end = smaller(begin + step, p.rows);
      const TileRows tiles(end - begin);
      if (begin > 0) team.sync();
      // A thread's share of whole tiles: TileRows of a sub-range would cut elsewhere, so gather tile by tile.
      const Range part = team.share(tiles.tiles);
      for (int64_t t = part.begin; t < part.end; ++t)
        direct_gather<T, Word>(s, p, x, {}, 0, begin + tiles.first(t), begin + tiles.first(t + 1),
                               block + tiles.first(t) * p.words);
      team.sync();
      Upcoming none;  // a thread touches its own columns of y only
      direct_multiply<T, Word>(a, p, 0, begin, end, mine.begin, mine.end, block, none);
    }
    return;
  }

  Word* block = reinterpret_cast<Word*>(scratch + team.rank * odd_lines(size_t(block_rows * p.words) * sizeof(Word)));
  // With moments chunk by chunk, whose rows are added up while they are in the caches.
  const Grid grid(p.rows, s.K);
  const RowShares shares(team, p.rows, a.moments ? grid.step : 0, block_rows);
  const auto pieces = [&](int owner) { return shares.pieces(owner); };
  team.each_piece(pieces, [&](int owner, int64_t i) {
    const Range rows = shares.piece(owner, i);
    const int64_t next = shares.of(owner).end;
    const int64_t step = round_up(Blocks(rows.size(), block_rows).step, a.moments ? int64_t(kGroupRows) : int64_t(1));
    for (int64_t begin = rows.begin; begin < rows.end; begin += step) {
      const int64_t end = smaller(begin + step, rows.end);
      Upcoming up = direct_upcoming<T>(a, end, smaller(end + step, next));
      up.share(s.groups * p.panels * TileRows(end - begin).tiles);
      for (int64_t group = 0; group < s.groups; ++group) {
        direct_gather<T, Word>(s, p, x, a.norm, group, begin, end, block);
        for (int64_t first = 0; first < p.panels; first += block_panels)
          direct_multiply<T, Word>(a, p, group, begin, end, first, smaller(first + block_panels, p.panels), block, up);
      }
      if (!a.moments) continue;
      const Moments m = moments_of(a.moments, grid, rows.begin / grid.step);
      const T* y = static_cast<const T*>(a.y);
      const Tile done{0, begin, end, 0, s.K};
      if (begin == rows.begin) start_moments(y + begin * s.K, s.K, rows.size(), done, m);
      add_moments(y, s.K, done, m);
    }
  });
}

}  // namespace RF_ISA
}  // namespace rf
