// The weight gradient of 1x1 filters at stride 1 in float32 by Strassen's algorithm, one level, as conv_strassen.cpp
// has it for the forward: 2*N*P*Q*K*C * 7/8 flops. The halves of the depth are the first and the second pixel of a pair
// of neighbours, those of dw's rows and columns the first and last filters and channels. The products are linear, so
// each is summed over all pairs first, seven GEMMs of half the filters by half the channels, and dw made of them once
// at the end. Of dy sums are taken and of x, which behind a ReLU is positive, differences. Two products multiply a
// quarter of either operand where it lies; the five sums of each are packed by the team, a block of pairs at a time, 5
// floats for 4, and the tiles then run over all of the block, each by one thread, block after
// block: the same bits for any team. Packing is what it costs: few filters or channels gain nothing.
#include "../conv_backward.h"
#include "../workspace.h"
#include "strassen.h"
#include "wgrad_tile.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kPacked = 5;  // sums of each operand; the others are quarters as they lie
constexpr int kTile = kTileRows * kPanel;
// Multiply-adds of a pixel for each value packed. 85 and 102 gained 0.97 to 1.03, 170 and 205 1.05, 410 1.13.
constexpr int64_t kLeastWork = 128;
constexpr int64_t kGrain = 28;                                  // pairs packed by one thread
constexpr int64_t kLeastBlock = 1 << 17, kMostBlock = 1 << 20;  // packed floats

struct Plan {
  const ConvShape& s;
  int64_t pairs, filters, channels;  // of a half
  Strips strips;
  int64_t panels;
  int64_t chain, block, blocks;  // pairs
  int64_t dy_row, x_row;         // packed floats of a pair

  explicit Plan(const ConvShape& shape)
      : s(shape), pairs(s.N * s.P * s.Q / 2), filters(s.K / 2), channels(s.C / 2), strips(filters) {
    panels = channels / kPanel;
    dy_row = row(kPacked * filters);
    x_row = row(kPacked * channels);
    chain = chain_of(pairs);
    // A block as large as the sums it is added to: both are read once a block.
    const int64_t floats = smaller(larger(s.K * s.C * 7 / 4, kLeastBlock), kMostBlock);
    blocks = ceil_div(pairs, larger(round_up(floats / (dy_row + x_row), chain), 2 * chain));
    block = round_up(ceil_div(pairs, blocks), chain);
    blocks = ceil_div(pairs, block);
  }
  // An odd number of cache lines: rows a power of two apart would share the caches' sets.
  static int64_t row(int64_t floats) { return (ceil_div(floats, int64_t(kLanes)) | 1) * kLanes; }
  int64_t block_floats() const { return block * (dy_row + x_row); }
  int64_t tiles() const { return strips.count * panels; }  // of a product
  // Two buffers, so that a team packs a block while its last still multiplies.
  int64_t floats() const { return (blocks > 1 ? 2 : 1) * block_floats() + kProducts * tiles() * kTile; }
};

class Run {
 public:
  Run(const WgradArgs& a, const Plan& p, float* buffer, const Team& team)
      : a_(a),
        p_(p),
        team_(team),
        buffer_(buffer),
        sums_(buffer + (p.blocks > 1 ? 2 : 1) * p.block_floats()),
        dy_(static_cast<const float*>(a.dy)),
        x_(static_cast<const float*>(a.x)) {}

  void run() {
    const int64_t tiles = kProducts * p_.tiles(), share = ceil_div(tiles, int64_t(team_.size));
    for (int64_t i = 0; i < p_.blocks; ++i) {
      const Range pairs{i * p_.block, smaller((i + 1) * p_.block, p_.pairs)};
      float *dy = buffer_ + i % 2 * p_.block_floats(), *x = dy + p_.block * p_.dy_row;
      team_.each_range(pairs.size(), kGrain, [&](Range part) {
        pack({pairs.begin + part.begin, pairs.begin + part.end}, dy + part.begin * p_.dy_row,
             x + part.begin * p_.x_row);
      });
      team_.sync();  // whoever passes has left the block before: its buffer is free for the next
      const Range next = share_of({pairs.end, smaller(pairs.end + p_.block, p_.pairs)});
      const int64_t steps = share * pairs.size();
      Stream ahead[2] = {{dy_ + next.begin * 2 * p_.s.K, next.size() * 2 * p_.s.K * 4, steps},
                         {x_ + next.begin * 2 * p_.s.C, next.size() * 2 * p_.s.C * 4, steps}};
      team_.each(tiles, [&](int64_t tile) { multiply(pairs, tile, dy, x, i == 0, ahead); });
    }
    team_.sync();
    team_.each(p_.tiles(), [&](int64_t tile) { write(tile); });
  }

 private:
  Range share_of(Range pairs) const {
    const Range part = team_.share(larger(pairs.size(), int64_t(0)));
    return {pairs.begin + part.begin, pairs.begin + part.end};
  }
  // The larger operand's part stays while the smaller one's, which may all be in L2, are walked.
  int64_t strip_of(int64_t tile) const { return p_.filters > p_.channels ? tile / p_.panels : tile % p_.strips.count; }
  int64_t panel_of(int64_t tile) const { return p_.filters > p_.channels ? tile % p_.panels : tile / p_.strips.count; }

  // Rows of a pair's sums: of dy for products 0, 1, 4, 5, 6, of x for 0, 2, 3, 5, 6.
  void pack(Range pairs, float* dy, float* x) const {
    for (int64_t pair = pairs.begin; pair < pairs.end; ++pair, dy += p_.dy_row, x += p_.x_row) {
      const float *one = dy_ + pair * 2 * p_.s.K, *two = one + p_.s.K;
      const int64_t filters = p_.filters, channels = p_.channels;
      for (int64_t k = 0; k < filters; k += kLanes) {
        const Vec a11 = load(one + k), a21 = load(one + filters + k), a12 = load(two + k),
                  a22 = load(two + filters + k);
        const Vec made[kPacked] = {a11 + a22, a21 + a22, a11 + a12, a21 - a11, a12 - a22};
        RF_UNROLL for (int i = 0; i < kPacked; ++i) store(dy + i * filters + k, made[i]);
      }
      one = x_ + pair * 2 * p_.s.C, two = one + p_.s.C;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec b11 = load(one + c), b12 = load(one + channels + c), b21 = load(two + c),
                  b22 = load(two + channels + c);
        const Vec made[kPacked] = {b11 - b22, b12 - b22, b21 - b11, b11 - b12, b21 - b22};
        RF_UNROLL for (int i = 0; i < kPacked; ++i) store(x + i * channels + c, made[i]);
      }
    }
  }

  void multiply(Range pairs, int64_t i, const float* dy, const float* x, bool fresh, Stream (&ahead)[2]) const {
    const int m = int(i / p_.tiles());
    const int64_t tile = i % p_.tiles(), strip = strip_of(tile);
    const int64_t k = p_.strips.first(strip), c = panel_of(tile) * kPanel;
    kOuterTiles<float>.at[p_.strips.height(strip)](left(m, pairs, dy, k), right(m, pairs, x, c), pairs.size(), p_.chain,
                                                   sums_ + i * kTile, fresh, ahead);
  }
  Operand<float> left(int m, Range pairs, const float* packed, int64_t k) const {
    if (m == 2) return {dy_ + pairs.begin * 2 * p_.s.K + k, 2 * p_.s.K};                        // a11
    if (m == 3) return {dy_ + pairs.begin * 2 * p_.s.K + p_.s.K + p_.filters + k, 2 * p_.s.K};  // a22
    return {packed + (m < 2 ? m : m - 2) * p_.filters + k, p_.dy_row};
  }
  Operand<float> right(int m, Range pairs, const float* packed, int64_t c) const {
    if (m == 1) return {x_ + pairs.begin * 2 * p_.s.C + c, 2 * p_.s.C};                         // b11
    if (m == 4) return {x_ + pairs.begin * 2 * p_.s.C + p_.s.C + p_.channels + c, 2 * p_.s.C};  // b22
    return {packed + (m == 0 ? 0 : m < 4 ? m - 1 : m - 2) * p_.channels + c, p_.x_row};
  }

  // The four quarters of dw of one tile.
  void write(int64_t tile) const {
    const int64_t strip = strip_of(tile), c = panel_of(tile) * kPanel;
    for (int64_t i = 0; i < p_.strips.height(strip); ++i) {
      const int64_t k = p_.strips.first(strip) + i;
      for (int n = 0; n < kPanel; n += kLanes) {
        Vec m[kProducts];
        RF_UNROLL for (int j = 0; j < kProducts; ++j) m[j] =
            load(sums_ + (j * p_.tiles() + tile) * kTile + i * kPanel + n);
        put(m[0] + m[3] + m[4] + m[6], k, c + n);
        put(m[4] + m[2], k, c + n + p_.channels);
        put(m[1] + m[3], k + p_.filters, c + n);
        put(m[1] - m[0] + m[2] - m[5], k + p_.filters, c + n + p_.channels);
      }
    }
  }
  RF_INLINE void put(Vec v, int64_t k, int64_t c) const {
    float* out = a_.dw + k * a_.stride_k + c * a_.stride_c;
    if (a_.stride_c == 1) return store(out, v);
    alignas(64) float each[kLanes];
    store(each, v);
    for (int i = 0; i < kLanes; ++i) out[i * a_.stride_c] = each[i];
  }

  const WgradArgs& a_;
  const Plan& p_;
  const Team& team_;
  float *buffer_, *sums_;
  const float *dy_, *x_;
};

}  // namespace

const char* wgrad_strassen_why_not(const ConvShape& s, DType t) {
  if (const char* why = strassen_why_not(s, t)) return why;
  if (s.C % (2 * kPanel) != 0 || s.K % (2 * kLanes) != 0)
    return "strassen halves channels and filters into whole panels and vectors";
  if (s.K * s.C < kLeastWork * (s.K + s.C)) return "few channels do not pay for strassen's sums";
  if (s.N * s.P * s.Q % 2 != 0) return "strassen takes an even number of pixels";
  return nullptr;
}

void wgrad_strassen(const WgradArgs& a) {
  const Plan p(a.shape);
  const Workspace work(size_t(p.floats()) * 4);
  parallel(a.threads, [&](const Team& team) { Run(a, p, work.floats(), team).run(); });
}

}  // namespace RF_ISA
}  // namespace rf
