// Rows of a GEMM (pixels, pairs of them) dealt out to a team, for Team::each_piece.
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace rf {
namespace RF_ISA {

// Every thread's share of `rows`, in pieces: chunks of `chunk` rows, whose statistics are one partial sum, or where
// chunk is 0 blocks of about `block` rows.
class RowShares {
 public:
  RowShares(const Team& team, int64_t rows, int64_t chunk, int64_t block)
      : team_(team), rows_(rows), chunk_(chunk), block_(block) {}

  Range of(int owner) const {
    return team_.share_of(owner, rows_, chunk_ > 0 ? chunk_ : share_grain(rows_, team_.size));
  }
  int64_t pieces(int owner) const {
    const int64_t size = of(owner).size();
    return size > 0 ? ceil_div(size, step(size)) : 0;
  }
  Range piece(int owner, int64_t i) const {
    const Range all = of(owner);
    const int64_t begin = all.begin + i * step(all.size());
    return {begin, smaller(begin + step(all.size()), all.end)};
  }

 private:
  int64_t step(int64_t size) const { return chunk_ > 0 ? chunk_ : Blocks(size, block_).step; }

  const Team& team_;
  int64_t rows_, chunk_, block_;
};

}  // namespace RF_ISA
}  // namespace rf
