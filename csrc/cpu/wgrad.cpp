// The weight gradient of any convolution on the CPU: dw[k][(r, s, c)] = sum over pixels of dy[pixel][k] x[tap of
// pixel][c], a GEMM whose depth is the pixels. 2*N*P*Q*K*R*S*C/groups flops; x, dy read once where a block of pixels
// stays in cache. Floats are multiplied where they lie (x where every pixel of it is one of dy's, as in a 1x1
// convolution); what must be gathered by taps or joined in pairs of pixels is packed by the team, a block of pixels at
// a time, into rows as dense as a tensor's. The tiles of dw then run over all of the block, each by one thread,
// block after block: the bits are the same for any team. While the tiles multiply they fetch the
// block after this one. Tried and lost: packing strips of filters and panels of columns apart from each other, so that
// tiles read them with stride 1: dozens of streams to write; 56x56, 64 to 256 took 11.3 ms in float32, of which the
// tiles took 7.4. Where dw is small beside the depth and something is packed, 16 or 32 parts of the depth are summed
// apart instead, each by one thread from what it packs itself, and the sums added in order: no thread reads what
// another wrote (bf16 56x56, 64 to 256 on two cores: 3.8 to 2.2 ms where they have two L3s, 2.3 where they share one).
// bf16: two pixels are a word, multiplied by vdpbf16ps where the machine has it; widened where not. There one operand
// only is packed, the narrower one: the tiles join the other's pixels in registers, and where that is dy they make dw
// turned, rows (r, s, c) by panels of filters. Groups of as many filters as channels that a vector holds whole, or that
// vectors fill, are wgrad_grouped.cpp's: here panels of so few columns stay empty.
#include "../conv_backward.h"
#include "../workspace.h"
#include "conv_algorithms.h"
#include "grouped.h"
#include "wgrad_tile.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kLeastBlock = 1 << 17, kMostBlock = 1 << 21;  // words of packed dy and x
constexpr int64_t kMostParts = 32, kLeastParts = 16;            // parts of depth, where there are several
constexpr int64_t kLeastPart = 256;                             // words of one
constexpr int64_t kPartSums = 5 << 18;                          // floats of the sums of all

template <class T, class Word>
struct Plan {
  static constexpr int kElements = WordOf<Word>::kElements;  // pixels of a word
  static constexpr bool kDirect = sizeof(T) == sizeof(Word);
  static constexpr bool kPairs = kElements == 2;
  const ConvShape& s;
  int64_t pixels, channels, cols;  // of one group
  bool turned = false;             // dw's rows are (r, s, c), its panels filters, dy's pixels are joined in registers
  bool x_direct;                   // x is multiplied where it lies
  int64_t panels;
  Strips strips;
  int64_t depth, chain, block, blocks;  // words of depth
  int64_t parts = 1, part;              // of depth, each summed by one thread: where dw is small beside it
  int64_t dy_row, x_row;                // words from step to step of depth

  explicit Plan(const ConvShape& shape) : s(shape), strips(0) {
    pixels = s.N * s.P * s.Q;
    channels = s.C / s.groups;
    cols = s.R * s.S * channels;
    x_direct = s.R * s.S * s.stride_h * s.stride_w == 1 && s.pad_h + s.pad_w == 0 && channels % kPanel == 0;
    if (kPairs) {
      const bool able = s.groups == 1 && pixels % kElements == 0;
      x_direct = x_direct && able;
      // Turned sums are written a float at a time: worth it where there are many more pixels to pack than rows to
      // write.
      turned = able && s.K % kPanel == 0 && (!x_direct || s.K >= s.C) && pixels >= 4 * cols;
      x_direct = x_direct && !turned;
    }
    x_direct = x_direct && (kDirect || kPairs);
    strips = Strips(turned ? cols : s.K / s.groups);
    panels = ceil_div(turned ? s.K : cols, int64_t(kPanel));
    dy_row = kDirect || turned ? s.K : packed_row(s.K);
    x_row = x_direct ? s.C : packed_row(s.groups * x_group());
    depth = ceil_div(pixels, int64_t(kElements));
    chain = chain_of(depth);
    // A block as large as the sums it is added to: both are read once a block.
    const int64_t words = smaller(larger(s.K * cols, kLeastBlock), kMostBlock);
    const int64_t unit = kPairs ? kTileRows : chain;
    blocks = ceil_div(depth, larger(round_up(words / (dy_row + x_row), unit), 2 * unit));
    block = round_up(ceil_div(depth, blocks), unit);
    blocks = ceil_div(depth, block);
    part = depth;
    const int64_t able = smaller(kPartSums / (tiles() * kTileRows * kPanel), depth / kLeastPart);
    if (able >= kLeastParts && dy_words() + x_words() > 0) {  // what is packed would be passed from thread to thread
      part = round_up(ceil_div(depth, able >= kMostParts ? kMostParts : kLeastParts), unit);
      parts = ceil_div(depth, part);
      block = round_up(ceil_div(part, ceil_div(part, block)), unit);
    }
    if (kPairs) chain = block;  // float32's rounding is nothing beside bf16's
  }
  // An odd number of cache lines: rows a power of two apart would share the caches' sets.
  static int64_t packed_row(int64_t words) { return (ceil_div(words, int64_t(kLanes)) | 1) * kLanes; }
  int64_t x_group() const { return round_up(cols, int64_t(kPanel)); }  // packed words of a group's row
  bool dy_packed() const { return !kDirect && !turned; }
  int64_t dy_words() const { return dy_packed() ? block * dy_row : 0; }
  int64_t x_words() const { return x_direct ? 0 : block * x_row; }
  int64_t tiles() const { return s.groups * panels * strips.count; }
};

// Words of n <= kLanes columns from one pixel, or from two (the second null: zeros).
template <class T>
RF_INLINE void put(float* out, const T* a, const T*, int n) {
  n >= kLanes ? store(out, load(a)) : store_n(out, load_n(a, n), n);
}
#if defined(__AVX512BF16__)
// kPanel columns of two pixels.
RF_INLINE void put_panel(Pair* out, const bf16* a, const bf16* b) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i one = _mm512_loadu_si512(a), two = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(one, low, two));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(one, high, two));
}
RF_INLINE void put(Pair* out, const bf16* a, const bf16* b, int n) {
  const __mmask16 mask = n >= kLanes ? __mmask16(0xffff) : first(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
  const __m512i high =
      b ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b)), 16) : _mm512_setzero_si512();
  _mm512_mask_storeu_epi32(out, mask, _mm512_or_si512(low, high));
}
#endif
template <class T, class Word>
RF_INLINE void put_row(Word* out, const T* a, const T* b, int64_t n) {
  int64_t c = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<Word, Pair>::value)
    for (; b && c + kPanel <= n; c += kPanel) put_panel(out + c, a + c, b + c);
#endif
  for (; c < n; c += kLanes) put(out + c, a + c, b ? b + c : nullptr, int(smaller(n - c, int64_t(kLanes))));
}

template <class T, class Word>
class WgradGemm {
  using Plan = RF_ISA::Plan<T, Word>;
  static constexpr int kElements = WordOf<Word>::kElements;
  static constexpr int64_t kTile = kTileRows * kPanel;
  static constexpr int64_t kGrain = 56;  // words of depth packed by one thread

 public:
  WgradGemm(const WgradArgs& a, const Plan& p, Word* buffer, const Team& team)
      : a_(a), s_(a.shape), p_(p), team_(team), buffer_(buffer) {}

  // Two buffers where there are several blocks, so that a team packs a block while its last still multiplies; the sums
  // of all tiles, or one tile a thread where one block is all; a pixel of zeros.
  static int64_t words(const Plan& p, int threads) {
    if (p.parts > 1) return threads * (p.dy_words() + p.x_words()) + p.parts * p.tiles() * kTile + zero_words(p);
    return (p.blocks > 1 ? 2 : 1) * (p.dy_words() + p.x_words()) + (p.blocks > 1 ? p.tiles() : threads) * kTile +
           zero_words(p);
  }
  static int64_t zero_words(const Plan& p) { return round_up(p.s.C, int64_t(kPanel)); }

  void run() { p_.parts > 1 ? run_parts() : run_tiles(); }

 private:
  // Every thread its parts of the depth, alone: nothing it packs or asks for is another's.
  void run_parts() {
    const int64_t block_words = p_.dy_words() + p_.x_words(), tiles = p_.tiles();
    Word* packed = buffer_ + team_.rank * block_words;
    float* sums = reinterpret_cast<float*>(buffer_ + team_.size * block_words);
    clear(sums + p_.parts * tiles * kTile);
    team_.each(p_.parts, [&](int64_t part) {
      const int64_t end = smaller((part + 1) * p_.part, p_.depth);
      for (int64_t begin = part * p_.part; begin < end; begin += p_.block) {
        const Range words{begin, smaller(begin + p_.block, end)}, all{0, words.size()};
        const Range next{words.end, smaller(words.end + p_.block, p_.depth)};
        pack(begin, all, packed);
        Stream ahead[2] = {dy_stream(next, next, tiles * all.size()), x_stream(next, next, tiles * all.size())};
        for (int64_t i = 0; i < tiles; ++i) {
          float* sum = sums + (part * tiles + i) * kTile;
          multiply(words, tile_at(i), packed, sum, begin == part * p_.part, ahead);
        }
      }
    });
    team_.sync();
    team_.each(tiles, [&](int64_t i) {
      float* sum = sums + i * kTile;
      for (int64_t part = 1; part < p_.parts; ++part) {
        const float* other = sum + part * tiles * kTile;
        for (int j = 0; j < kTile; j += kLanes) store(sum + j, load(sum + j) + load(other + j));
      }
      write(tile_at(i), sum);
    });
  }

  // The pixel of zeros, for all to read.
  void clear(float* zeros) {
    zeros_ = reinterpret_cast<const T*>(zeros);
    const Range zero = team_.share(zero_words(p_));
    std::memset(zeros + zero.begin, 0, size_t(zero.size()) * 4);
    team_.sync();
  }

  void run_tiles() {
    const int64_t block_words = p_.dy_words() + p_.x_words();
    float* sums = reinterpret_cast<float*>(buffer_ + (p_.blocks > 1 ? 2 : 1) * block_words);
    clear(sums + (p_.blocks > 1 ? p_.tiles() : team_.size) * kTile);
    const Range mine = team_.share(p_.tiles());
    for (int64_t block = 0; block < p_.blocks; ++block) {
      const Range words{block * p_.block, smaller((block + 1) * p_.block, p_.depth)};
      Word* packed = buffer_ + block % 2 * block_words;
      if (block_words > 0) {
        team_.each_range(words.size(), kGrain, [&](Range part) { pack(words.begin, part, packed); });
        // Whoever passes has left the block before: its buffer is free for the next, and its sums are complete.
        team_.sync();
      }
      const Range next{words.end, smaller(words.end + p_.block, p_.depth)};
      const Range share = team_.share(larger(next.size(), int64_t(0))),
                  packs{next.begin + share.begin, next.begin + share.end};
      const int64_t steps = mine.size() * words.size();
      Stream ahead[2] = {dy_stream(next, packs, steps), x_stream(next, packs, steps)};
      const auto add = [&](int64_t i) {
        const Tile tile = tile_at(i);
        float* sum = sums + (p_.blocks > 1 ? i : team_.rank) * kTile;
        multiply(words, tile, packed, sum, block == 0, ahead);
        if (block == p_.blocks - 1) write(tile, sum);
      };
      if (block_words > 0) {
        team_.each(p_.tiles(), add);
      } else {  // no barrier between blocks: a tile's sums stay with a thread
        for (int64_t i = mine.begin; i < mine.end; ++i) add(i);
      }
    }
  }

  struct Tile {
    int64_t group, strip, panel;
  };
  // The larger operand's part stays while the smaller one's, which may all be in L2, are walked.
  Tile tile_at(int64_t i) const {
    const int64_t each = p_.strips.count * p_.panels, group = i / each, at = i % each;
    if (p_.strips.rows > p_.panels * kPanel) return {group, at / p_.panels, at % p_.panels};
    return {group, at % p_.strips.count, at / p_.strips.count};
  }

  void multiply(Range words, const Tile& tile, const Word* packed, float* sum, bool fresh, Stream (&ahead)[2]) {
    const int64_t height = p_.strips.height(tile.strip), row = p_.strips.first(tile.strip);
    const int64_t k = tile.group * (s_.K / s_.groups) + row;  // dw's rows are filters
    const auto run = [&](Operand<Word> rows, auto panel) {
      kOuterTiles<Word, decltype(panel)>.at[height](rows, panel, words.size(), p_.chain, sum, fresh, ahead);
    };
    if constexpr (Plan::kPairs) {
      const auto pixels = [&](const void* tensor, int64_t width) {
        const T* first = static_cast<const T*>(tensor) + words.begin * kElements * width;
        return PixelPairs{first + tile.panel * kPanel, width};
      };
      if (p_.turned) return run({packed + row, p_.x_row}, pixels(a_.dy, s_.K));
      if (p_.x_direct) return run({packed + k, p_.dy_row}, pixels(a_.x, s_.C));
    }
    const Word *dy = packed, *x = packed + p_.dy_words();
    if constexpr (Plan::kDirect) {
      dy = static_cast<const T*>(a_.dy) + words.begin * s_.K;
      if (p_.x_direct) x = static_cast<const T*>(a_.x) + words.begin * s_.C;
    }
    run({dy + k, p_.dy_row}, Operand<Word>{x + (tile.group * p_.panels + tile.panel) * kPanel, p_.x_row});
  }

  // The bytes of words of depth that this thread will read first: to multiply all, to pack what it packs.
  Stream dy_stream(Range words, Range packs, int64_t steps) const {
    if (words.size() <= 0) return {};
    const Range part = p_.dy_packed() ? packs : words;
    const T* from = static_cast<const T*>(a_.dy) + part.begin * kElements * s_.K;
    return {from, part.size() * kElements * s_.K * int64_t(sizeof(T)), steps};
  }
  Stream x_stream(Range words, Range packs, int64_t steps) const {
    const int64_t area = s_.stride_h * s_.stride_w;          // pixels of x for one of dy
    if (words.size() <= 0 || area > s_.R * s_.S) return {};  // few of the bytes in between are wanted
    const Range part = p_.x_direct ? words : packs;
    const Pixel at(s_, part.begin * kElements);
    const T* from =
        static_cast<const T*>(a_.x) + ((at.n * s_.H + at.p * s_.stride_h) * s_.W + at.q * s_.stride_w) * s_.C;
    return {from, part.size() * kElements * area * s_.C * int64_t(sizeof(T)), steps};
  }

  // An output pixel; successors without a division.
  struct Pixel {
    const ConvShape& s;
    int64_t index, n, p, q;
    Pixel(const ConvShape& shape, int64_t i) : s(shape), index(i), n(i / s.Q / s.P), p(i / s.Q % s.P), q(i % s.Q) {}
    RF_INLINE void next() {
      ++index;
      if (++q < s.Q) return;
      q = 0;
      if (++p < s.P) return;
      p = 0, ++n;
    }
  };

  // Words `part` of the block that begins at word `first`.
  void pack(int64_t first, Range part, Word* packed) {
    Word *dy = packed + part.begin * p_.dy_row, *x = packed + p_.dy_words() + part.begin * p_.x_row;
    Pixel at(s_, (first + part.begin) * kElements);
    for (int64_t i = part.begin; i < part.end; ++i, dy += p_.dy_row, x += p_.x_row) {
      const Pixel one = at;
      at.next();
      const bool both = kElements > 1 && at.index < p_.pixels;
      const Pixel two = at;
      if (kElements > 1) at.next();
      if (p_.dy_packed()) {
        const T* row = static_cast<const T*>(a_.dy) + one.index * s_.K;
        put_row(dy, row, both ? row + s_.K : nullptr, s_.K);
      }
      if (!p_.x_direct) pack_taps(one, both ? &two : nullptr, x);
    }
  }
  // x under every tap of a pixel, or of two: [group][tap][channel].
  void pack_taps(const Pixel& one, const Pixel* two, Word* x) const {
    for (int64_t group = 0; group < s_.groups; ++group, x += p_.x_group()) {
      Word* out = x;
      for (int64_t r = 0; r < s_.R; ++r) {
        for (int64_t t = 0; t < s_.S; ++t, out += p_.channels) {
          const int64_t c = group * p_.channels;
          put_row(out, tap(one, r, t) + c, two ? tap(*two, r, t) + c : nullptr, p_.channels);
        }
      }
      std::memset(static_cast<void*>(out), 0, size_t(p_.x_group() - p_.cols) * sizeof(Word));
    }
  }
  RF_INLINE const T* tap(const Pixel& at, int64_t r, int64_t t) const {
    const int64_t h = at.p * s_.stride_h - s_.pad_h + r * s_.dilation_h,
                  w = at.q * s_.stride_w - s_.pad_w + t * s_.dilation_w;
    return h >= 0 && h < s_.H && w >= 0 && w < s_.W
               ? static_cast<const T*>(a_.x) + ((at.n * s_.H + h) * s_.W + w) * s_.C
               : zeros_;
  }

  // dw of one tile from its sums, [row][kPanel].
  void write(const Tile& tile, float* sums) const {
    const int64_t first = p_.strips.first(tile.strip), rows = p_.strips.height(tile.strip);
    if constexpr (Plan::kPairs) {
      for (int64_t i = 0; i < rows && (p_.turned || p_.x_direct); ++i) PixelPairs::restore(sums + i * kPanel);
      if (p_.turned) {
        float* out[kTileRows];
        for (int64_t i = 0; i < rows; ++i) out[i] = place(tile.panel * kPanel, first + i);
        const auto neighbours = [&](float** p) { return p[1] == p[0] + 1 && p[2] == p[1] + 1 && p[3] == p[2] + 1; };
        int64_t done = 0;  // rows, four at a time
        for (; done + 4 <= rows && neighbours(out + done); done += 4)
          for (int64_t j = 0; j < kPanel; j += 4)
            transpose4(sums + done * kPanel + j, kPanel, out[done] + j * a_.stride_k, a_.stride_k);
        for (int64_t j = 0; j < kPanel; ++j)
          for (int64_t i = done; i < rows; ++i) out[i][j * a_.stride_k] = sums[i * kPanel + j];
        return;
      }
    }
    const int64_t k0 = tile.group * (s_.K / s_.groups) + first;
    const int64_t last = smaller((tile.panel + 1) * kPanel, p_.cols);
    for (int64_t k = 0; k < rows; ++k) {
      const float* in = sums + k * kPanel;
      for (int64_t col = tile.panel * kPanel; col < last;) {
        const int64_t n = smaller(p_.channels - col % p_.channels, last - col);
        float* out = place(k0 + k, col);
        if (a_.stride_c == 1)
          std::memcpy(out, in, size_t(n) * 4);
        else
          for (int64_t i = 0; i < n; ++i) out[i * a_.stride_c] = in[i];
        in += n, col += n;
      }
    }
  }
  RF_INLINE float* place(int64_t k, int64_t col) const {  // col: (r, s, c)
    const int64_t tap = col / p_.channels, c = col % p_.channels;
    return a_.dw + k * a_.stride_k + c * a_.stride_c + tap / s_.S * a_.stride_r + tap % s_.S * a_.stride_s;
  }

  const WgradArgs& a_;
  const ConvShape& s_;
  const Plan& p_;
  const Team& team_;
  Word* buffer_;
  const T* zeros_;
};

template <class T, class Word>
void wgrad_any(const WgradArgs& a) {
  const Plan<T, Word> p(a.shape);
  const Workspace work(size_t(WgradGemm<T, Word>::words(p, a.threads)) * sizeof(Word));
  Word* buffer = reinterpret_cast<Word*>(work.floats());
  parallel(a.threads, [&](const Team& team) { WgradGemm<T, Word>(a, p, buffer, team).run(); });
}

}  // namespace

const char* wgrad_why_not(const ConvShape& s, DType) {
  return wgrad_grouped_why_not(s) ? narrow_groups_why_not(s) : nullptr;
}

void wgrad(const WgradArgs& a) {
  if (!wgrad_grouped_why_not(a.shape)) return wgrad_grouped(a);
  a.dtype == DType::f32 ? wgrad_any<float, float>(a) : wgrad_any<bf16, Bf16Word>(a);
}

}  // namespace RF_ISA
}  // namespace rf
