// The weight gradient of a grouped convolution with as many filters as channels: dw[k][j] of filter k, channel j of its
// group, is a sum over pixels of dy[k] * x[channel j of k's group]. 2*N*P*Q*K*R*S*C/groups flops, every lane of every
// multiply-add useful.
// A vector of dy holds whole groups, whose channel j of x one permutation spreads over their lanes; or a part of one
// group, whose channels are broadcast. A spread pixel of x is multiplied by every pixel of dy that a tap brings it
// to: the three of a 3-wide filter at stride 1, two and one in turn at stride 2. The sums of a few channels by one row
// of taps stay in registers for some rows of pixels, then join totals in memory.
// Rows are copied to buffers first, one vector of channels side by side: pixels a power of two apart would share cache
// sets. While one vector's are multiplied the next one's are fetched, each pixel once: fetching on past them took 1.3
// times as long at 56x56, 4 channels a group, float32. Of bf16, where vdpbf16ps is, a word is two pixels that meet the
// same taps: at 14x14, 16 a group, 1.3 ms for 2.2 of widened floats. Chunks of images, whose number hangs on the shape
// alone, have totals of their own, added in order at the end: any team adds the same numbers in the same order.
#include "../workspace.h"
#include "grouped.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kUnits = 32;             // at least so many parts for a team to share
constexpr int64_t kChainPixels = 64;       // summed in registers before they join the totals
constexpr int64_t kBlockWords = 24 << 10;  // of rows of x and dy copied at a time
constexpr int kAtOnce = 4;                 // channels whose sums a loop over pixels keeps, where they are permuted
constexpr int kBroadcast = kLanes == 16 ? 8 : 4;  // and where they are broadcast

enum class Way { taps3, taps3_by_2, tap };  // what a loop over pixels covers: 3 taps at stride 1, at stride 2; any one

struct Plan {
  Way way;
  int elements;                                      // pixels of a word: pairs of bf16 in the first two ways
  int64_t per_group, strip, strips, vectors;         // a strip of channels: one vector, or a group of several
  int64_t steps;                                     // of a loop over a row: words of pixels
  int64_t x_first, x_cols, dy_first, dy_cols;        // columns copied: from the first one on, vectors of words
  int64_t block_rows, blocks, chain_rows, chunks;    // rows of dy
  int64_t x_rows, x_row, x_plane, dy_row, dy_plane;  // words but for x_rows
  int64_t totals, buffer;                            // words of a vector's totals, of a thread's buffers

  Plan(const ConvShape& s, int most_elements) {
    per_group = s.C / s.groups;
    strip = larger(per_group, int64_t(kLanes));
    strips = ceil_div(s.C, strip);
    vectors = strip / kLanes;
    const bool three = s.S == 3 && s.dilation_w == 1;
    way = three && s.stride_w == 1                  ? Way::taps3
          : three && s.stride_w == 2 && s.pad_w > 0 ? Way::taps3_by_2  // else the first tap has a pixel of its own
                                                    : Way::tap;
    elements = way == Way::tap ? 1 : most_elements;
    steps = ceil_div(way == Way::taps3 ? s.W : s.Q, int64_t(elements));
    x_first = way == Way::taps3 ? 0 : way == Way::taps3_by_2 ? 1 - s.pad_w : -s.pad_w;
    x_cols = way == Way::taps3        ? steps
             : way == Way::taps3_by_2 ? 2 * steps
                                      : (s.Q - 1) * s.stride_w + (s.S - 1) * s.dilation_w + 1;
    dy_first = way == Way::taps3 ? s.pad_w - 2 : 0;
    dy_cols = steps * elements + (way == Way::taps3 ? 2 : way == Way::taps3_by_2 ? 1 : 0);
    x_row = x_cols * kLanes, dy_row = dy_cols * kLanes;
    chain_rows = smaller(larger(kChainPixels / s.Q, int64_t(1)), s.P);
    const int64_t fit = kBlockWords / vectors / (s.stride_h * x_row + dy_row);
    blocks = ceil_div(s.P, larger(fit / chain_rows * chain_rows, chain_rows));
    block_rows = smaller(round_up(ceil_div(s.P, blocks), chain_rows), s.P);
    chunks = smaller(ceil_div(kUnits, strips), s.N);
    x_rows = (block_rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
    x_plane = x_rows * x_row, dy_plane = block_rows * dy_row;
    totals = per_group * s.R * s.S * kLanes;
    buffer = (vectors * (x_plane + dy_plane) / kLanes | 1) * kLanes;
  }
};

// Word w of a row: columns first + w * step + e * apart for its elements e; zeros beside the image.
#if defined(__AVX512BF16__)
RF_INLINE __m512i wide(const bf16* row, int64_t size, int64_t width, int64_t col, __mmask16 channels) {
  if (col < 0 || col >= size) return _mm512_setzero_si512();
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(channels, row + col * width));
}
RF_INLINE void put_pair(Pair* to, __m512i low, __m512i high) {
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// dy: every column and the one after it.
void copy_neighbours(Pair* to, const bf16* row, int64_t size, int64_t width, int64_t first, int64_t count,
                     int channels) {
  const __mmask16 mask = RF_ISA::first(channels);
  __m512i low = wide(row, size, width, first, mask);
  for (int64_t col = first + 1; col <= first + count; ++col, to += kLanes) {
    const __m512i high = wide(row, size, width, col, mask);
    put_pair(to, low, high);
    low = high;
  }
}
// x: at stride 1 columns two by two, at stride 2 of four the first with the third, the second with the fourth.
void copy_steps(Pair* to, const bf16* row, int64_t size, int64_t width, int64_t first, int64_t count, int channels,
                Way way) {
  const __mmask16 mask = RF_ISA::first(channels);
  const int apart = way == Way::taps3 ? 1 : 2;
  for (int64_t i = 0; i < count; i += apart, first += 2 * apart) {
    for (int64_t col = first; col < first + apart; ++col, to += kLanes)
      put_pair(to, wide(row, size, width, col, mask), wide(row, size, width, col + apart, mask));
  }
}
#endif
template <class T>
void copy_neighbours(float* to, const T* row, int64_t size, int64_t width, int64_t first, int64_t count, int channels) {
  copy_columns(to, row, size, width, first, count, channels);
}
template <class T>
void copy_steps(float* to, const T* row, int64_t size, int64_t width, int64_t first, int64_t count, int channels, Way) {
  copy_columns(to, row, size, width, first, count, channels);
}

// Pixels to be brought into L2 while others are multiplied, `step` bytes apart: the copy alone waits for memory.
struct Pixels {
  const char* at;
  int64_t step;
  RF_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

// Rows of pixels one loop walks, buffers' strides in words.
struct Walk {
  int64_t rows, steps, x_row, dy_row, x_step;
  Pixels next[2];
};

template <int kChannels, bool kPermuted>
struct Spread {
  Lanes lanes[kPermuted ? kChannels : 1];
  // Channels [first, first + kChannels) of a group.
  Spread(int64_t first, int64_t per_group) {
    RF_UNROLL for (int i = 0; i < (kPermuted ? kChannels : 0); ++i) {
      alignas(64) int32_t from[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) from[lane] = (lane & -int(per_group)) + int(first) + i;
      lanes[i] = load_lanes(from);
    }
  }
  template <class Word>
  RF_INLINE auto at(const Word* x, int i) const {
    if constexpr (kPermuted)
      return permute(fetch(x), lanes[i]);
    else
      return spread(x + i);
  }
};

// totals[channel][tap][lane] += the sums of the walk. x: the channel's vector where it is permuted, else the channel.
template <Way kWay, int kChannels, bool kPermuted, class Word>
void add_rows(Walk& walk, const Word* x_rows, const Word* dy_rows, int64_t first, int64_t per_group, float* totals,
              int64_t totals_channel) {
  constexpr int kTaps = kWay == Way::tap ? 1 : 3, kStep = WordOf<Word>::kElements * kLanes;
  const Spread<kChannels, kPermuted> spread(first, per_group);
  Pixels next_x = walk.next[0], next_dy = walk.next[1];  // in registers
  Vec acc[kChannels][kTaps];
  RF_UNROLL for (int c = 0; c < kChannels; ++c) RF_UNROLL for (int t = 0; t < kTaps; ++t) acc[c][t] = zero();
  for (int64_t row = 0; row < walk.rows; ++row, x_rows += walk.x_row, dy_rows += walk.dy_row) {
    const Word *x = x_rows, *dy = dy_rows;
    for (int64_t i = 0; i < walk.steps; ++i, x += walk.x_step, dy += kStep) {
      next_x.fetch();
      next_dy.fetch();
      if constexpr (kWay == Way::taps3) {
        const auto d0 = fetch(dy + 2 * kLanes), d1 = fetch(dy + kLanes), d2 = fetch(dy);
        RF_UNROLL for (int c = 0; c < kChannels; ++c) {
          const auto v = spread.at(x, c);
          acc[c][0] = multiply_add(v, d0, acc[c][0]);
          acc[c][1] = multiply_add(v, d1, acc[c][1]);
          acc[c][2] = multiply_add(v, d2, acc[c][2]);
        }
      } else if constexpr (kWay == Way::taps3_by_2) {
        // The middle column of this pixel's window; its last, which is the next one's first.
        const auto d0 = fetch(dy + kLanes), d1 = fetch(dy);
        RF_UNROLL for (int c = 0; c < kChannels; ++c) {
          const auto v = spread.at(x, c), w = spread.at(x + kLanes, c);
          acc[c][1] = multiply_add(v, d1, acc[c][1]);
          acc[c][0] = multiply_add(w, d0, acc[c][0]);
          acc[c][2] = multiply_add(w, d1, acc[c][2]);
        }
      } else {
        const auto d = fetch(dy);
        RF_UNROLL for (int c = 0; c < kChannels; ++c) acc[c][0] = multiply_add(spread.at(x, c), d, acc[c][0]);
      }
    }
  }
  walk.next[0] = next_x, walk.next[1] = next_dy;
  RF_UNROLL for (int c = 0; c < kChannels; ++c) {
    RF_UNROLL for (int t = 0; t < kTaps; ++t) {
      float* total = totals + c * totals_channel + t * kLanes;
      store(total, load(total) + acc[c][t]);
    }
  }
}

template <class Word>
using AddRows = void (*)(Walk&, const Word*, const Word*, int64_t, int64_t, float*, int64_t);

template <int kChannels, bool kPermuted, class Word>
AddRows<Word> pick(Way way) {
  if (way == Way::taps3) return add_rows<Way::taps3, kChannels, kPermuted, Word>;
  if (way == Way::taps3_by_2) return add_rows<Way::taps3_by_2, kChannels, kPermuted, Word>;
  if constexpr (WordOf<Word>::kElements == 1) return add_rows<Way::tap, kChannels, kPermuted, Word>;
  return nullptr;
}

template <class T, class Word>
class Run {
 public:
  Run(const WgradArgs& a, const Plan& p, float* memory, const Team& team) : a_(a), s_(a.shape), p_(p), all_(memory) {
    x_ = reinterpret_cast<Word*>(memory + p.chunks * chunk_totals() + team.rank * p.buffer);
    dy_ = x_ + p.vectors * p.x_plane;
    const bool permuted = p.per_group < kLanes;
    at_once_ = !permuted ? kBroadcast : int(smaller(p.per_group, int64_t(kAtOnce)));
    add_ = !permuted       ? pick<kBroadcast, false, Word>(p.way)
           : at_once_ == 1 ? pick<1, true, Word>(p.way)
           : at_once_ == 2 ? pick<2, true, Word>(p.way)
                           : pick<kAtOnce, true, Word>(p.way);
    permuted_ = permuted;
    const Range mine = team.share(p.chunks * p.strips);
    for (int64_t i = mine.begin; i < mine.end;) {
      const int64_t chunk = i / p.strips, first = i % p.strips;
      const int64_t last = smaller(p.strips, first + mine.end - i);
      sum_chunk(chunk, {first, last});
      i += last - first;
    }
    team.sync();
    const Range done = team.share(p.strips * p.vectors);
    for (int64_t v = done.begin; v < done.end; ++v) write(v);
  }

 private:
  int64_t chunk_totals() const { return p_.strips * p_.vectors * p_.totals; }

  void sum_chunk(int64_t chunk, Range strips) {
    float* totals = all_ + chunk * chunk_totals() + strips.begin * p_.vectors * p_.totals;
    std::memset(totals, 0, size_t(strips.size() * p_.vectors * p_.totals) * sizeof(float));
    for (int64_t n = s_.N * chunk / p_.chunks; n < s_.N * (chunk + 1) / p_.chunks; ++n) {
      for (int64_t p = 0; p < s_.P; p += p_.block_rows) {
        const Range rows = {p, smaller(p + p_.block_rows, s_.P)};
        for (int64_t i = strips.begin; i < strips.end; ++i) {
          copy(n, rows, i * p_.strip);
          const bool more = i + 1 < strips.end;  // strips of these rows; then the rows below or the next image's
          const int64_t row = more ? p : rows.end;
          aim(n, row, more ? i + 1 : strips.begin);
          add(rows, totals + (i - strips.begin) * p_.vectors * p_.totals);
        }
      }
    }
  }

  void copy(int64_t n, Range rows, int64_t channel) {
    const T *x = static_cast<const T*>(a_.x) + n * s_.H * s_.W * s_.C + channel,
            *dy = static_cast<const T*>(a_.dy) + n * s_.P * s_.Q * s_.K + channel;
    const int64_t first = rows.begin * s_.stride_h - s_.pad_h;
    const int64_t last = (rows.end - 1) * s_.stride_h - s_.pad_h + (s_.R - 1) * s_.dilation_h;
    const int channels = int(smaller(s_.C - channel, int64_t(kLanes)));
    for (int64_t v = 0; v < p_.vectors; ++v, x += kLanes, dy += kLanes) {
      for (int64_t h = larger(first, int64_t(0)); h <= smaller(last, s_.H - 1); ++h)
        copy_steps(x_ + v * p_.x_plane + (h - first) * p_.x_row, x + h * s_.W * s_.C, s_.W, s_.C, p_.x_first, p_.x_cols,
                   channels, p_.way);
      for (int64_t p = rows.begin; p < rows.end; ++p)
        copy_neighbours(dy_ + v * p_.dy_plane + (p - rows.begin) * p_.dy_row, dy + p * s_.Q * s_.K, s_.Q, s_.K,
                        p_.dy_first, p_.dy_cols, channels);
    }
  }

  void aim(int64_t n, int64_t p, int64_t strip) {
    const int64_t h = larger(p * s_.stride_h - s_.pad_h, int64_t(0)), channel = strip * p_.strip;
    next_[0] = {static_cast<const char*>(a_.x) + ((n * s_.H + h) * s_.W * s_.C + channel) * int64_t(sizeof(T)),
                s_.C * int64_t(sizeof(T))};
    next_[1] = {static_cast<const char*>(a_.dy) + ((n * s_.P + p) * s_.Q * s_.K + channel) * int64_t(sizeof(T)),
                s_.K * int64_t(sizeof(T))};
  }

  // The rows copied, a chain of them at a time, to a strip's totals: [vector][row of taps][channel][tap][lane].
  void add(Range rows, float* totals) {
    const int64_t x_step = p_.way == Way::taps3 ? 1 : p_.way == Way::taps3_by_2 ? 2 : s_.stride_w;
    Walk walk = {0, p_.steps, s_.stride_h * p_.x_row, p_.dy_row, x_step * kLanes, {next_[0], next_[1]}};
    const int64_t taps = p_.way == Way::tap ? s_.S : 1, channel = s_.S * kLanes;
    const int64_t dy_passes = p_.elements, x_passes = dy_passes * s_.stride_h * s_.stride_w;  // that see every pixel
    const int64_t top = rows.begin * s_.stride_h - s_.pad_h;
    for (int64_t begin = rows.begin; begin < rows.end; begin += p_.chain_rows) {
      for (int64_t r = 0; r < s_.R; ++r) {
        // Those of the chain whose row under this tap is in the image.
        const int64_t up = s_.pad_h - r * s_.dilation_h;
        const int64_t p0 = larger(begin, up > 0 ? ceil_div(up, s_.stride_h) : 0);
        const int64_t p1 =
            smaller(smaller(begin + p_.chain_rows, rows.end), s_.H + up > 0 ? ceil_div(s_.H + up, s_.stride_h) : 0);
        walk.rows = p1 - p0;
        if (walk.rows <= 0) continue;
        const Word* x = x_ + (p0 * s_.stride_h - up - top) * p_.x_row;
        const Word* dy = dy_ + (p0 - rows.begin) * p_.dy_row;
        int64_t pass = r * p_.per_group / at_once_;
        for (int64_t v = 0; v < p_.vectors; ++v, dy += p_.dy_plane) {
          for (int64_t j = 0; j < p_.per_group; j += at_once_) {
            const Word* from = permuted_ ? x : x + j / kLanes * p_.x_plane + j % kLanes;
            float* to = totals + v * p_.totals + (r * p_.per_group + j) * channel;
            walk.next[0].step = pass < x_passes ? next_[0].step : 0;
            walk.next[1].step = pass++ < dy_passes ? next_[1].step : 0;
            for (int64_t t = 0; t < taps; ++t)
              add_(walk, from + t * s_.dilation_w * kLanes, dy, j, p_.per_group, to + t * kLanes, channel);
          }
        }
      }
    }
  }

  // dw of a vector of filters: the chunks' totals, added in order.
  void write(int64_t vector) {
    float* sums = all_ + vector * p_.totals;
    for (int64_t chunk = 1; chunk < p_.chunks; ++chunk) {
      const float* more = sums + chunk * chunk_totals();
      for (int64_t i = 0; i < p_.totals; i += kLanes) store(sums + i, load(sums + i) + load(more + i));
    }
    const int64_t filters = smaller(s_.K - vector * kLanes, int64_t(kLanes));
    for (int64_t lane = 0; lane < filters; ++lane) {
      float* out = a_.dw + (vector * kLanes + lane) * a_.stride_k;
      for (int64_t r = 0; r < s_.R; ++r) {
        for (int64_t t = 0; t < s_.S; ++t) {
          const float* in = sums + (r * p_.per_group * s_.S + t) * kLanes + lane;
          float* to = out + r * a_.stride_r + t * a_.stride_s;
          for (int64_t j = 0; j < p_.per_group; ++j) to[j * a_.stride_c] = in[j * s_.S * kLanes];
        }
      }
    }
  }

  const WgradArgs& a_;
  const ConvShape& s_;
  const Plan& p_;
  float* all_;
  Word *x_, *dy_;
  int at_once_;
  bool permuted_;
  Pixels next_[2];
  AddRows<Word> add_;
};

template <class T, class Word>
void wgrad_any(const WgradArgs& a) {
  const Plan p(a.shape, WordOf<Word>::kElements);
  const Workspace work(size_t(p.chunks * p.strips * p.vectors * p.totals + a.threads * p.buffer) * sizeof(Word));
  float* memory = work.floats();
  parallel(a.threads, [&](const Team& team) { Run<T, Word>(a, p, memory, team); });
}

}  // namespace

const char* wgrad_grouped_why_not(const ConvShape& s) {
  if (s.groups == 1) return "grouped needs more than one group";
  if (s.C != s.K) return "grouped needs as many filters as channels";
  const int64_t per_group = s.C / s.groups;
  if (kLanes % per_group != 0 && per_group % kLanes != 0)
    return "grouped needs channels per group that divide the vector, or that it divides";
  return nullptr;
}

void wgrad_grouped(const WgradArgs& a) {
  if (a.dtype == DType::f32) return wgrad_any<float, float>(a);
  const bool pairs = Plan(a.shape, WordOf<Bf16Word>::kElements).elements == 2;
  pairs ? wgrad_any<bf16, Bf16Word>(a) : wgrad_any<bf16, float>(a);
}

}  // namespace RF_ISA
}  // namespace rf
