// "strassen": 1x1 filters of stride 1 in float32 with seven products for eight (Strassen, "Gaussian elimination is not
// optimal", 1969), one level: 2*N*P*Q*K*C * 7/8 flops. The halves of the rows are the first and the second of two
// neighbouring pixels of an image, those of the depth and of the columns the first and the last channels and filters.
// Which rows are added up is thus the same whatever the blocks, the threads and the other images: the same bits.
// Of x differences are taken and of the filters sums: behind a ReLU x is positive, and sums of it would be twice as
// large. The rms error is 1.4 to 1.6 times that of one chain (with sums 1.8). Infinities and NaN reach the other pixel
// of their pair. A block of pairs is gathered as conv_direct.h does it, seven times half the channels for four, and
// every panel of seven products sweeps it; the sums of a panel stay in L1 or L2 until they are added up, scaled and
// stored. That takes the time of some 35 channels' arithmetic, and gathering 5 % of 64 filters': few channels gain
// nothing.
#include "conv_strassen.h"

#include "conv_direct.h"

namespace rf {
namespace RF_ISA {

namespace {

const char* why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "strassen rounds too often for bfloat16";
  if (s.R * s.S * s.stride_h * s.stride_w != 1 || s.pad_h + s.pad_w != 0)
    return "strassen takes 1x1 filters at stride 1 without padding";
  if (s.groups != 1) return "strassen takes one group";
  if (s.planar) return "strassen reads NHWC only";
  if (s.C % (2 * kChunk<float>) != 0 || s.K % (2 * kPanel) != 0)
    return "strassen halves channels and filters into whole vectors and panels";
  if (s.P * s.Q < 2) return "strassen takes pairs of pixels of an image";
  return nullptr;
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

size_t packed_bytes(const ConvShape& s, DType) {
  const StrassenPlan p(s);
  return size_t(p.panels * kProducts * p.panel_floats()) * sizeof(float);
}

void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int threads) {
  const PackStridedArgs a = {s, t, 0, packed, w, s.C, 1, 1, 1, threads};
  parallel(threads, [&](const Team& team) { strassen_pack_panels(a, fold, team); });
}

constexpr int kTile = kTileRows * kPanel;  // floats of a tile's sums

struct Block {
  int64_t pairs;
  size_t sums_bytes, bytes;
  Block(const StrassenPlan& p, const ConvConfig& c) {
    const int64_t usual = 2 * kTileRows;  // one tile rereads the weights, four outgrow L1 with their sums: 1-4 % slower
    pairs = smaller(c.block_rows > 0 ? larger(int64_t(c.block_rows / 2), int64_t(1)) : usual, p.pairs);
    pairs = round_up(pairs, int64_t(kGroupRows / 2));  // see add_moments
    sums_bytes = odd_lines(size_t(TileRows(pairs).tiles * kProducts * kTile) * sizeof(float));
    bytes = sums_bytes + odd_lines(size_t(pairs * kProducts * p.half) * sizeof(float));
  }
};

size_t scratch_bytes(const ConvShape& s, DType, const ConvConfig& c, int threads) {
  return Block(StrassenPlan(s), c).bytes * size_t(threads);
}

class Run {
 public:
  Run(const ConvArgs& a, const Team& team)
      : a_(a), s_(a.shape), p_(a.shape), block_(p_, a.config), x_(static_cast<const float*>(a.x)) {
    char* own = static_cast<char*>(a.scratch) + block_.bytes * size_t(team.rank);
    sums_ = reinterpret_cast<float*>(own);
    left_ = reinterpret_cast<float*>(own + block_.sums_bytes);
    y_ = static_cast<float*>(a.y);
    residual_ = static_cast<const float*>(a.residual);
  }

  void run(const Team& team) {
    const Grid grid(p_.pairs * 2, s_.K);  // with moments every pair is whole
    const int64_t chunk = grid.step / 2;
    const RowShares shares(team, p_.pairs, a_.moments ? chunk : 0, block_.pairs);
    const auto pieces = [&](int owner) { return shares.pieces(owner); };
    team.each_piece(pieces, [&](int owner, int64_t i) {
      const Range pairs = shares.piece(owner, i);
      const int64_t next = shares.of(owner).end;
      const int64_t step = round_up(Blocks(pairs.size(), block_.pairs).step, int64_t(kGroupRows / 2));
      for (int64_t begin = pairs.begin; begin < pairs.end; begin += step) {
        const int64_t end = smaller(begin + step, pairs.end);
        compute(begin, end, smaller(end + step, next));
        if (!a_.moments) continue;
        const Moments m = moments_of(a_.moments, grid, pairs.begin / chunk);
        const Tile done{0, 2 * begin, 2 * end, 0, s_.K};
        if (begin == pairs.begin) start_moments(y_ + 2 * begin * s_.K, s_.K, 2 * pairs.size(), done, m);
        add_moments(y_, s_.K, done, m);
      }
    });
  }

 private:
  void compute(int64_t begin, int64_t end, int64_t next_end) {
    const TileRows tiles(end - begin);
    gather(begin, tiles);
    Upcoming up;
    const int64_t row = p_.row(end), rows = end < next_end ? p_.row(next_end) - row : 0;
    if (rows > 0) {
      up.add(x_ + row * s_.C, rows * s_.C);
      if (residual_) up.add(residual_ + row * s_.K, rows * s_.K);
      up.add(y_ + row * s_.K, rows * s_.K);
    }
    up.share(p_.panels * kProducts * tiles.tiles);
    Ahead ahead;
    ahead.weights_step = Ahead::step(p_.panel_floats() * int64_t(sizeof(float)), tiles.tiles * p_.half);
    const float *const packed = static_cast<const float*>(a_.packed), *weights = packed;
    for (int64_t panel = 0; panel < p_.panels; ++panel) {
      for (int m = 0; m < kProducts; ++m, weights += p_.panel_floats()) {
        const bool last = panel + 1 == p_.panels && m + 1 == kProducts;
        ahead.weights = reinterpret_cast<const char*>(last ? packed : weights + p_.panel_floats());
        for (int64_t t = 0; t < tiles.tiles; ++t) {
          const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
          up.fetch(ahead, p_.half);
          kSumTiles<float>.at[height](left_ + (first * kProducts + height * m) * p_.half, weights, p_.chunks,
                                      sums_ + (t * kProducts + m) * kTile, ahead);
        }
      }
      for (int64_t t = 0; t < tiles.tiles; ++t)
        finish_tile(begin + tiles.first(t), begin + tiles.first(t + 1), panel, sums_ + t * kProducts * kTile);
    }
  }

  // A tile's seven left operands: [product][chunk][row][kChunk].
  void gather(int64_t begin, const TileRows& tiles) {
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
      const float* pixel[kTileRows];
      bool whole[kTileRows];
      for (int64_t r = 0; r < height; ++r) {
        pixel[r] = x_ + p_.row(begin + first + r) * s_.C;
        whole[r] = is_whole(begin + first + r);
      }
      float* to = left_ + first * kProducts * p_.half;
      const int64_t product = height * p_.half;
      for (int64_t c = 0; c < p_.half; c += kLanes) {
        for (int64_t r = 0; r < height; ++r, to += kLanes) {
          const float *one = pixel[r] + c, *two = one + s_.C;
          const Vec a11 = read(one, c), a12 = read(one + p_.half, c + p_.half);
          const Vec a21 = whole[r] ? read(two, c) : zero(), a22 = whole[r] ? read(two + p_.half, c + p_.half) : zero();
          store(to, a11 - a22);
          store(to + product, a21 - a22);
          store(to + 2 * product, a11);
          store(to + 3 * product, a22);
          store(to + 4 * product, a12 - a11);
          store(to + 5 * product, a21 - a11);
          store(to + 6 * product, a12 - a22);
        }
      }
    }
  }
  RF_INLINE Vec read(const float* x, int64_t c) const {
    const ConvNorm& norm = a_.norm;
    if (!norm.mean) return load(x);
    return relu(fma(load(x) - load(norm.mean + c), load(norm.scale + c), load(norm.beta + c)));
  }
  RF_INLINE bool is_whole(int64_t pair) const { return (pair % p_.pairs_per_image) * 2 + 1 < p_.pixels; }

  // A tile of pairs' outputs of one panel of both halves of the filters, from its seven sums.
  void finish_tile(int64_t begin, int64_t end, int64_t panel, const float* sums) const {
    const int64_t half = p_.panels * kPanel;
    for (int n = 0; n < kPanel; n += kLanes) {
      const int64_t k = panel * kPanel + n;
      const Finish left(a_, k), right(a_, k + half);
      const float* from = sums + n;
      for (int64_t pair = begin; pair < end; ++pair, from += kPanel) {
        Vec m[kProducts];
        RF_UNROLL for (int i = 0; i < kProducts; ++i) m[i] = load(from + i * kTile);
        const int64_t at = p_.row(pair) * s_.K + k;
        left.put(m[0] + m[3] - m[4] + m[6], at);
        right.put(m[2] + m[4], at + half);
        if (!is_whole(pair)) continue;
        left.put(m[1] + m[3], at + s_.K);
        right.put(m[0] - m[1] + m[2] + m[5], at + s_.K + half);
      }
    }
  }
  // The epilogue of one vector of filters.
  struct Finish {
    Vec scale, shift;
    float* y;
    const float* residual;
    bool relu;
    Finish(const ConvArgs& a, int64_t k)
        : scale(a.scale ? load(a.scale + k) : broadcast(1.f)),
          shift(a.shift ? load(a.shift + k) : zero()),
          y(static_cast<float*>(a.y)),
          residual(static_cast<const float*>(a.residual)),
          relu(a.relu) {}
    RF_INLINE void put(Vec v, int64_t at) const {
      store(y + at, finish(v, scale, shift, residual ? residual + at : nullptr, relu));
    }
  };

  const ConvArgs& a_;
  const ConvShape& s_;
  const StrassenPlan p_;
  const Block block_;
  const float *x_, *residual_;
  float *y_, *sums_, *left_;
};

void run(const ConvArgs& a, const Team& team) { Run(a, team).run(team); }

bool takes_moments(const ConvShape& s, const ConvConfig&) { return s.P * s.Q % 2 == 0; }  // chunks are of whole pairs
bool takes_norm(const ConvShape&, DType, const ConvConfig&) { return true; }

}  // namespace

extern const Algorithm kStrassen;
const Algorithm kStrassen = {"strassen",    2,         1, why_not, defaults, packed_bytes, pack, scratch_bytes, run,
                             takes_moments, takes_norm};

}  // namespace RF_ISA
}  // namespace rf
