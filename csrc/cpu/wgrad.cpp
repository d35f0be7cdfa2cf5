// The weight gradient of any convolution on the CPU: dw[k][(r, s, c)] = sum over pixels of dy[pixel][k] x[tap of pixel][c],
// a GEMM whose depth is the pixels. 2*N*P*Q*K*R*S*C/groups flops; x, dy read once where a block of pixels stays in cache.
// A block of pixels: the team packs dy into strips of filters and x, tap by tap, into panels of columns (3 cycles a vector
// for K cycles of products: copying x for every tap costs less than walking it with strides), then every thread runs its own
// tiles of dw over all of it. A tile has one owner and one order of blocks: the same bits for any team.
// bf16: two pixels are a word, multiplied by vdpbf16ps where the machine has it; widened where not.
#include "../conv_backward.h"
#include "conv_algorithms.h"
#include "scratch.h"
#include "wgrad_tile.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kLeastBlock = 1 << 17, kMostBlock = 1 << 21;  // words of packed dy and x

template <class Word>
struct Plan {
  static constexpr int kElements = WordOf<Word>::kElements;  // pixels of a word
  const ConvShape& s;
  int64_t pixels, channels, cols, panels;  // of one group
  Strips strips;
  int64_t chain, block, blocks;  // words of depth
  int64_t stride;                // words of depth between strips and panels: odd, or they would share L1 sets
  int64_t dy_words, x_words;

  explicit Plan(const ConvShape& shape) : s(shape), strips(shape.K / shape.groups) {
    pixels = s.N * s.P * s.Q;
    channels = s.C / s.groups;
    cols = s.R * s.S * channels;
    panels = ceil_div(cols, int64_t(kPanel));
    const int64_t depth = ceil_div(pixels, int64_t(kElements)), each = s.groups * (strips.count * kStripStride + panels * kPanel);
    // Sums join memory about sqrt(depth) times, each about sqrt(depth) long.
    chain = 28;
    while (chain < 224 && chain * chain < depth) chain *= 2;
    // A block as large as the sums it is added to: both are read once a block.
    const int64_t words = smaller(larger(s.K * cols, kLeastBlock), kMostBlock);
    blocks = ceil_div(depth, larger(round_up(words / each, chain), 2 * chain));
    block = round_up(ceil_div(depth, blocks), chain);
    blocks = ceil_div(depth, block);
    stride = block | 1;
    dy_words = s.groups * strips.count * stride * kStripStride;
    x_words = s.groups * panels * stride * kPanel;
  }
  int64_t tiles() const { return s.groups * panels * strips.count; }
};

// Words of n <= kLanes columns from one pixel, or from two (the second null: zeros).
template <class T>
RF_INLINE void put(float* out, const T* a, const T*, int n) {
  n >= kLanes ? store(out, load(a)) : store(out, load_n(a, n));
}
#if defined(__AVX512BF16__)
RF_INLINE void put(Pair* out, const bf16* a, const bf16* b, int n) {
  const __mmask16 mask = n >= kLanes ? __mmask16(0xffff) : first(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
  const __m512i high = b ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b)), 16) : _mm512_setzero_si512();
  _mm512_storeu_si512(out, _mm512_or_si512(low, high));
}
#endif

template <class T, class Word>
class WgradGemm {
  static constexpr int kElements = WordOf<Word>::kElements;
  static constexpr int64_t kTile = kTileRows * kPanel;

 public:
  WgradGemm(const WgradArgs& a, const Plan<Word>& p, Word* buffer, const Team& team) : a_(a), s_(a.shape), p_(p), team_(team), buffer_(buffer) {}

  // Two buffers where there are several blocks, so that a team packs a block while its last still multiplies; the sums of
  // all tiles, or one tile a thread where one block is all; two pixels' columns a thread and a pixel of zeros.
  static int64_t words(const Plan<Word>& p, int threads) {
    const int64_t sums = (p.blocks > 1 ? p.tiles() : threads) * kTile;
    return (p.blocks > 1 ? 2 : 1) * (p.dy_words + p.x_words) + sums + threads * row_words(p) * 2 + zero_words(p);
  }
  static int64_t row_words(const Plan<Word>& p) { return p.panels * kPanel; }
  static int64_t zero_words(const Plan<Word>& p) { return round_up(p.s.C, int64_t(kPanel)); }

  void run() {
    const int64_t block_words = p_.dy_words + p_.x_words;
    float* sums = reinterpret_cast<float*>(buffer_ + (p_.blocks > 1 ? 2 : 1) * block_words);
    float* rows = sums + (p_.blocks > 1 ? p_.tiles() : team_.size) * kTile;
    zeros_ = reinterpret_cast<const T*>(rows + team_.size * row_words(p_) * 2);
    row_ = reinterpret_cast<T*>(rows + team_.rank * row_words(p_) * 2);
    const Range zero = team_.share(zero_words(p_));
    std::memset(rows + team_.size * row_words(p_) * 2 + zero.begin, 0, size_t(zero.size()) * 4);
    std::memset(static_cast<void*>(row_), 0, size_t(row_words(p_)) * 2 * 4);
    team_.sync();
    const Range mine = team_.share(p_.tiles());
    const int64_t depth = ceil_div(p_.pixels, int64_t(kElements));
    for (int64_t block = 0; block < p_.blocks; ++block) {
      const int64_t begin = block * p_.block, end = smaller(begin + p_.block, depth);
      Word *dy = buffer_ + block % 2 * block_words, *x = dy + p_.dy_words;
      const Range part = team_.share(end - begin);
      Pixel at(s_, (begin + part.begin) * kElements);
      for (int64_t i = part.begin; i < part.end; ++i) pack(at, dy + i * kStripStride, x + i * kPanel);
      team_.sync();  // whoever passes has left the block before: its buffer is free for the next
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t strip = i % p_.strips.count, panel = i / p_.strips.count, group = panel / p_.panels;
        float* tile = sums + (p_.blocks > 1 ? i : team_.rank) * kTile;
        kOuterTiles<Word>.at[p_.strips.height(strip)](dy + (group * p_.strips.count + strip) * p_.stride * kStripStride, x + panel * p_.stride * kPanel, end - begin, p_.chain, tile, block == 0);
        if (block == p_.blocks - 1) write(group, panel % p_.panels, strip, tile);
      }
    }
  }

 private:
  // An output pixel and the input pixel under its first tap; successors without a division.
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

  // The next word of depth: a row of dy's strips and a row of x's panels.
  void pack(Pixel& at, Word* dy, Word* x) {
    const T* from = static_cast<const T*>(a_.dy) + at.index * s_.K;
    const T* image0 = static_cast<const T*>(a_.x) + at.n * s_.H * s_.W * s_.C;
    const int64_t h0 = at.p * s_.stride_h - s_.pad_h, w0 = at.q * s_.stride_w - s_.pad_w;
    at.next();
    const bool both = kElements > 1 && at.index < p_.pixels;
    const T* image1 = static_cast<const T*>(a_.x) + at.n * s_.H * s_.W * s_.C;
    const int64_t h1 = at.p * s_.stride_h - s_.pad_h, w1 = at.q * s_.stride_w - s_.pad_w;
    if (kElements > 1) at.next();
    const int64_t filters = s_.K / s_.groups;
    for (int64_t group = 0; group < s_.groups; ++group) {
      for (int64_t strip = 0; strip < p_.strips.count; ++strip, dy += p_.stride * kStripStride) {
        const int64_t k = p_.strips.first(strip), height = p_.strips.height(strip);
        // A whole vector where dy has one: what lies beyond the strip's rows is never read.
        for (int64_t n = 0; n < height; n += kLanes) {
          const T* row = from + group * filters + k + n;
          put(dy + n, row, both ? row + s_.K : nullptr, int(smaller(s_.K - group * filters - k - n, int64_t(kLanes))));
        }
      }
    }
    const bool whole = p_.channels % kPanel == 0;
    for (int64_t group = 0; group < s_.groups; ++group) {
      const int64_t c0 = group * p_.channels;
      T* rows[2] = {row_, row_ + p_.panels * kPanel};
      for (int64_t r = 0; r < s_.R; ++r) {
        for (int64_t t = 0; t < s_.S; ++t) {
          const T* a = tap(image0, h0 + r * s_.dilation_h, w0 + t * s_.dilation_w) + c0;
          const T* b = both ? tap(image1, h1 + r * s_.dilation_h, w1 + t * s_.dilation_w) + c0 : nullptr;
          if (whole) {
            for (int64_t c = 0; c < p_.channels; c += kPanel, x += p_.stride * kPanel) put_panel(x, a + c, b ? b + c : nullptr);
            continue;
          }
          const int64_t to = (r * s_.S + t) * p_.channels;
          copy(rows[0] + to, a, p_.channels);
          if (b) copy(rows[1] + to, b, p_.channels);
        }
      }
      if (whole) continue;
      for (int64_t panel = 0; panel < p_.panels; ++panel, x += p_.stride * kPanel)
        put_panel(x, rows[0] + panel * kPanel, both ? rows[1] + panel * kPanel : nullptr);
    }
  }
  RF_INLINE const T* tap(const T* image, int64_t h, int64_t w) const {
    return h >= 0 && h < s_.H && w >= 0 && w < s_.W ? image + (h * s_.W + w) * s_.C : zeros_;
  }
  static RF_INLINE void put_panel(Word* out, const T* a, const T* b) {
    put(out, a, b, kLanes);
    put(out + kLanes, a + kLanes, b ? b + kLanes : nullptr, kLanes);
  }
  static RF_INLINE void copy(T* to, const T* from, int64_t n) {
    for (; n >= kLanes; n -= kLanes, to += kLanes, from += kLanes) store(to, load(from));
    if (n > 0) store_n(to, load_n(from, int(n)), int(n));
  }

  // dw of one tile from its sums, [row][kPanel]: columns are (r, s, c).
  void write(int64_t group, int64_t panel, int64_t strip, const float* sums) const {
    const int64_t k0 = group * (s_.K / s_.groups) + p_.strips.first(strip), rows = p_.strips.height(strip);
    const int64_t last = smaller((panel + 1) * kPanel, p_.cols);
    for (int64_t k = 0; k < rows; ++k) {
      const float* in = sums + k * kPanel;
      for (int64_t col = panel * kPanel; col < last;) {
        const int64_t tap = col / p_.channels, c = col % p_.channels, n = smaller(p_.channels - c, last - col);
        float* out = a_.dw + (k0 + k) * a_.stride_k + c * a_.stride_c + tap / s_.S * a_.stride_r + tap % s_.S * a_.stride_s;
        if (a_.stride_c == 1) std::memcpy(out, in, size_t(n) * 4);
        else for (int64_t i = 0; i < n; ++i) out[i * a_.stride_c] = in[i];
        in += n, col += n;
      }
    }
  }

  const WgradArgs& a_;
  const ConvShape& s_;
  const Plan<Word>& p_;
  const Team& team_;
  Word* buffer_;
  const T* zeros_;
  T* row_;
};

template <class T, class Word>
void wgrad_any(const WgradArgs& a) {
  const Plan<Word> p(a.shape);
  static_assert(sizeof(Word) == 4, "scratch is counted in words of four bytes");
  Word* buffer = reinterpret_cast<Word*>(scratch(size_t(WgradGemm<T, Word>::words(p, a.threads))));
  parallel(a.threads, [&](const Team& team) { WgradGemm<T, Word>(a, p, buffer, team).run(); });
}

}  // namespace

const char* wgrad_why_not(const ConvShape& s, DType) {
  // Grouped 3x3 of 4, 8, 16 and 32 channels a group ran at 4, 11, 26 and 79 GFLOP/s: panels of so few columns stay empty.
  if (s.groups > 1 && s.C / s.groups < 16) return "groups of fewer than 16 input channels are left to torch";
  return nullptr;
}

void wgrad(const WgradArgs& a) { a.dtype == DType::f32 ? wgrad_any<float, float>(a) : wgrad_any<bf16, Bf16Word>(a); }

}  // namespace RF_ISA
}  // namespace rf
