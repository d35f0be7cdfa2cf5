// The data gradient of a grouped convolution with as many filters as channels, the group a divisor of the vector, any
// stride. 2*N*P*Q*K*R*S*(C/groups) flops: input pixels fall into the residue classes of dgrad.cpp, and inside one the
// gradient is a small grouped convolution of dy of stride 1, whose taps lie in dy's rows as the forward's in x's.
// Rows of dy are copied to a padded buffer once for all classes, one vector of channels side by side.
#include "../workspace.h"
#include "grouped.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kBlockRows = 8;  // of every class

// Input pixels first + i * stride, i < count, and their taps, backwards from `last`, every `every`-th: tap b of them
// meets output pixel i + offset + b * step.
struct Axis {
  int64_t count = 0, taps = 0, last = 0, every = 1, offset = 0, step = 1;
  Axis(int64_t first, int64_t size, int64_t filter, int64_t stride, int64_t pad, int64_t dilation) {
    count = size > first ? ceil_div(size - first, stride) : 0;
    for (int64_t t = filter - 1; t >= 0; --t) {
      const int64_t reach = first + pad - t * dilation;
      if (reach % stride != 0) continue;
      if (taps == 0) last = t, offset = reach / stride;
      if (taps == 1) every = last - t, step = reach / stride - offset;
      ++taps;
    }
  }
  int64_t end() const { return offset + (taps - 1) * step; }
};

template <class T, class Word>
class Run {
  static constexpr int kElements = WordOf<Word>::kElements;
  static constexpr int64_t kPixel = kPixelWords<Word>;

 public:
  Run(const DgradArgs& a)
      : a_(a), s_(a.shape), per_group_(s_.C / s_.groups), vectors_(ceil_div(s_.C, int64_t(kLanes))) {
    int64_t right = 0, below = 0, most = 0;
    for (int64_t i = 0; i < s_.stride_h; ++i) {
      const Axis h = axis_h(i);
      most = larger(most, h.count);
      if (h.taps > 0 && h.count > 0) top_ = smaller(top_, h.offset), below = larger(below, h.end());
    }
    for (int64_t i = 0; i < s_.stride_w; ++i) {
      const Axis w = axis_w(i);
      if (w.taps > 0 && w.count > 0) left_ = smaller(left_, w.offset), right = larger(right, w.count - 1 + w.end());
    }
    blocks_ = ceil_div(most, kBlockRows);
    columns_ = right - left_ + 1;
    rows_ = kBlockRows + below - top_;
    buffer_ = (columns_ * rows_ * kPixel / kLanes + 1) * kLanes;
    filters_ = s_.R * s_.S * per_group_ / kElements * kLanes;
  }
  size_t words(int threads) const { return size_t(vectors_ * filters_ + threads * buffer_); }

  void run(Word* memory, const Team& team) const {
    team.each(vectors_, [&](int64_t v) { pack(v, memory + v * filters_); });
    team.sync();
    Word* rows = memory + vectors_ * filters_ + team.rank * buffer_;
    team.each(s_.N * blocks_ * vectors_, [&](int64_t i) {
      const int64_t v = i % vectors_, block = i / vectors_ % blocks_, n = i / vectors_ / blocks_;
      copy(n, block * kBlockRows, v * kLanes, rows);
      each_class([&](int64_t h0, int64_t w0, const Axis& h, const Axis& w, int64_t taps) {
        const Range of_class{block * kBlockRows, smaller((block + 1) * kBlockRows, h.count)};
        sum(n, of_class, v * kLanes, h0, w0, h, w, rows,
            memory + v * filters_ + taps * per_group_ / kElements * kLanes);
      });
    });
  }

 private:
  Axis axis_h(int64_t i) const { return {i, s_.H, s_.R, s_.stride_h, s_.pad_h, s_.dilation_h}; }
  Axis axis_w(int64_t i) const { return {i, s_.W, s_.S, s_.stride_w, s_.pad_w, s_.dilation_w}; }
  int channels(int64_t c) const { return int(smaller(s_.C - c, int64_t(kLanes))); }

  // body(first row, first column, their axes, taps of the classes before).
  template <class Body>
  void each_class(const Body& body) const {
    int64_t before = 0;
    for (int64_t h0 = 0; h0 < s_.stride_h; ++h0) {
      const Axis h = axis_h(h0);
      for (int64_t w0 = 0; w0 < s_.stride_w; ++w0) {
        const Axis w = axis_w(w0);
        body(h0, w0, h, w, before);
        before += h.taps * w.taps;
      }
    }
  }

  // A vector's filters: [class][row][word of the group's filters][tap][lane]: lane c holds w[k, c, r, s].
  void pack(int64_t v, Word* packed) const {
    auto* out = reinterpret_cast<typename WordOf<Word>::Element*>(packed);
    each_class([&](int64_t, int64_t, const Axis& h, const Axis& w, int64_t) {
      for (int64_t i = 0; i < h.taps; ++i) {
        for (int64_t j = 0; j < per_group_; j += kElements) {
          for (int64_t t = 0; t < w.taps; ++t) {
            const float* tap = a_.w + (h.last - i * h.every) * a_.stride_r + (w.last - t * w.every) * a_.stride_s;
            for (int64_t c = v * kLanes; c < (v + 1) * kLanes; ++c) {
              const float* filter =
                  tap + (c / per_group_ * per_group_ + j) * a_.stride_k + c % per_group_ * a_.stride_c;
              for (int64_t e = 0; e < kElements; ++e) from_float(c < s_.C ? filter[e * a_.stride_k] : 0.f, out++);
            }
          }
        }
      }
    });
  }

  void copy(int64_t n, int64_t row, int64_t c, Word* to) const {
    const T* dy = static_cast<const T*>(a_.dy) + c;
    for (int64_t p = row + top_; p < row + top_ + rows_; ++p, to += columns_ * kPixel) {
      const bool inside = p >= 0 && p < s_.P;  // else a row of no pixels
      copy_columns(to, dy + (n * s_.P + (inside ? p : 0)) * s_.Q * s_.K, inside ? s_.Q : 0, s_.K, left_, columns_,
                   channels(c));
    }
  }

  void sum(int64_t n, Range rows, int64_t c, int64_t h0, int64_t w0, const Axis& h, const Axis& w, const Word* from,
           const Word* filters) const {
    const int64_t pixel = s_.stride_w * s_.C, taps = h.taps * w.taps;
    const int count = channels(c);
    const TileRow<Word> tiles({h.taps, w.taps, int(per_group_), kPixel, w.step * kPixel, h.step * columns_ * kPixel},
                              w.count);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* dx = static_cast<T*>(a_.dx) + ((n * s_.H + h0 + i * s_.stride_h) * s_.W + w0) * s_.C + c;
      if (taps == 0) {  // no tap reaches the class
        for (int64_t j = 0; j < w.count; ++j) store_n(dx + j * pixel, zero(), count);
        continue;
      }
      tiles.run(from + ((i - rows.begin + h.offset - top_) * columns_ + w.offset - left_) * kPixel, filters,
                [&](const float* sums, int64_t j, int64_t tile) {
                  T* out = dx + j * pixel;
                  for (int64_t k = 0; k < tile; ++k, out += pixel, sums += kLanes)
                    count == kLanes ? store(out, load(sums)) : store_n(out, load(sums), count);
                });
    }
  }

  const DgradArgs& a_;
  const ConvShape& s_;
  const int64_t per_group_, vectors_;
  int64_t left_ = 0, top_ = 0, columns_, rows_, blocks_, buffer_, filters_;  // the first column and row copied, of dy
};

template <class T, class Word>
void dgrad_any(const DgradArgs& a) {
  const Run<T, Word> run(a);
  const Workspace work(size_t(run.words(a.threads)) * sizeof(Word));
  Word* memory = reinterpret_cast<Word*>(work.floats());
  parallel(a.threads, [&](const Team& team) { run.run(memory, team); });
}

}  // namespace

const char* dgrad_grouped_why_not(const ConvShape& s) {
  if (s.groups == 1) return "grouped needs more than one group";
  if (s.C != s.K) return "grouped needs as many filters as channels";
  if (kLanes % (s.C / s.groups) != 0) return "grouped needs channels per group that divide the vector";
  return nullptr;
}

void dgrad_grouped(const DgradArgs& a) {
  if (a.dtype == DType::f32) return dgrad_any<float, float>(a);
  grouped_pairs(a.shape, a.dtype) ? dgrad_any<bf16, Bf16Word>(a) : dgrad_any<bf16, float>(a);
}

}  // namespace RF_ISA
}  // namespace rf
