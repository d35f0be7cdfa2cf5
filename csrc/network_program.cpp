// A plan's memory and steps, and the calls that run them.
//
// Memory: every value lives from the group of steps that writes it to the last that reads it (groups: steps without a
// barrier between them); values written in smaller passes than they are read live from the start, because the
// smaller passes repeat around them. Largest first, each takes the lowest place no value of its time holds.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "network.h"

namespace rf {

static bool is_conv(const Node& n) { return n.op == Op::conv || n.op == Op::linear; }
static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The convolution rows of one band stay well inside a core's L2.
static constexpr int64_t kBandBytes = 320 << 10;

ConvShape Plan::band_shape(int pool, int64_t* band) const {
  const Node& n = network_->nodes()[pool];
  ConvShape s = shape_of(n.x, 1);
  const int64_t row = s.Q * s.K * int64_t(dtype_size(network_->dtype()));
  const int64_t rows = std::max(n.kernel.h, kBandBytes / row);
  const int64_t pooled = std::min(extents_[pool].H, std::max(int64_t(1), (rows - n.kernel.h) / n.stride.h + 1));
  s.P = std::min(s.P, (pooled - 1) * n.stride.h + n.kernel.h);
  if (band) *band = pooled;
  return s;
}

void Plan::place_values() {
  const std::vector<Node>& nodes = network_->nodes();
  const int count = int(nodes.size());
  struct Item {
    int value;
    bool scratch;
    int64_t bytes;
    int begin, end;  // groups, both included
    int64_t offset;
  };
  std::vector<Item> items;
  std::vector<int> item_of(count, -1), alias(count);
  offset_.assign(count, 0);
  scratch_.assign(count, 0);
  for (int i = 0; i < count; ++i) {
    alias[i] = i;
    if (!live_[i] || fused_into_[i] >= 0) continue;
    if (const int64_t bytes = scratch_bytes(i)) items.push_back({i, true, bytes, group_[i], group_[i], 0});
    if (i == network_->output()) continue;
    int end = group_[i];
    for (int reader : readers_[i]) end = std::max(end, group_[reader]);
    const int begin = store_[i] > level_[i] ? 0 : group_[i];
    // y may take the place of an operand that is read element by element and by nothing else from here on.
    const Node& n = nodes[i];
    const bool wise = !is_conv(n) && (n.op == Op::scale || n.op == Op::add || n.op == Op::relu || n.op == Op::sigmoid);
    for (int v : {n.residual, wise ? n.x : -1}) {
      if (v <= 0 || alias[i] != i) continue;
      const int elsewhere = v == n.residual ? n.x : n.residual;
      bool free = item_of[v] >= 0 && store_[v] == store_[i] && elsewhere != v && n.gate != v;
      for (int w = 0; w < count && free; ++w) {  // everything in the same memory
        if (alias[w] != alias[v] || item_of[w] < 0) continue;
        for (int reader : readers_[w]) free = free && (reader == i || group_[reader] < group_[i]);
      }
      if (!free) continue;
      alias[i] = alias[v];
      item_of[i] = item_of[v];
      items[item_of[v]].begin = std::min(items[item_of[v]].begin, begin);
      items[item_of[v]].end = std::max(items[item_of[v]].end, end);
    }
    if (alias[i] != i) continue;
    item_of[i] = int(items.size());
    items.push_back({i, false, round_up(levels_[store_[i]].images * value_bytes(i)), begin, end, 0});
  }

  std::vector<int> order(items.size());
  for (int i = 0; i < int(order.size()); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return items[a].bytes > items[b].bytes; });
  int64_t total = 0;
  std::vector<const Item*> placed;
  for (int i : order) {
    Item& item = items[i];
    item.bytes = round_up(item.bytes);
    int64_t at = 0;
    for (const Item* other : placed) {  // by offset
      if (other->end < item.begin || item.end < other->begin) continue;
      if (at + item.bytes <= other->offset) break;
      at = std::max(at, other->offset + other->bytes);
    }
    item.offset = at;
    total = std::max(total, at + item.bytes);
    const auto after = std::upper_bound(placed.begin(), placed.end(), &item,
                                        [](const Item* a, const Item* b) { return a->offset < b->offset; });
    placed.insert(after, &item);
  }
  for (const Item& item : items) (item.scratch ? scratch_ : offset_)[item.value] = item.offset;
  for (int i = 0; i < count; ++i) {
    if (item_of[i] >= 0) offset_[i] = items[item_of[i]].offset;
  }
  arena_bytes_ = size_t(total);
}

// Where a value's `image` lies: its memory covers one pass of its store level, which begins at a multiple of that
// level's images inside the pass around it.
Place Plan::place_of(int value, int64_t image, Input input) const {
  if (value < 0) return {};
  if (value == network_->output()) return {Space::output, image * value_bytes(value)};
  if (value == 0 && input != Input::converted) return {Space::input, image * value_bytes(0)};
  int64_t begin = 0;
  for (int level = int(levels_.size()) - 1; level >= store_[value]; --level) {
    begin += (image - begin) / levels_[level].images * levels_[level].images;
  }
  return {Space::arena, offset_[value] + (image - begin) * value_bytes(value)};
}

void Plan::emit(std::vector<Step>& steps, int level, int64_t begin, int64_t end, Input input) const {
  const Level& pass = levels_[level];
  for (int64_t a = begin; a < end; a += pass.images) {
    const int64_t b = std::min(end, a + pass.images);
    if (level > 0) emit(steps, level - 1, a, b, input);
    for (int i = pass.first; i <= pass.last; ++i) {
      if (!live_[i] || fused_into_[i] >= 0 || level_[i] != level || (i == 0 && input != Input::converted)) continue;
      const bool follows = !steps.empty() && level_[steps.back().node] == level && steps.back().node < i;
      if (follows) steps.back().sync = group_[steps.back().node] != group_[i];
      steps.push_back(step_of(i, a, b, input));
    }
  }
}

Step Plan::step_of(int node, int64_t begin, int64_t end, Input input) const {
  const Node& n = network_->nodes()[node];
  const DType dtype = network_->dtype();
  const Extent& out = extents_[node];
  Step s;
  s.node = node;
  s.dtype = dtype;
  s.relu = n.relu;
  s.images = end - begin;
  s.pixels = out.H * out.W;
  s.channels = out.C;
  s.y = place_of(node, begin, input);
  s.residual = place_of(n.residual, begin, input);
  s.gate = place_of(n.gate, begin, input);
  s.scratch = {Space::arena, scratch_[node]};
  if (node == 0) {
    s.kind = StepKind::layout;
    s.x = {Space::input, begin * out.elements()};
    return s;
  }
  const bool fused = n.op == Op::max_pool && fused_into_[n.x] == node;
  s.x = place_of(fused ? network_->nodes()[n.x].x : n.x, begin, input);
  const int conv = fused ? n.x : is_conv(n) ? node : -1;
  if (conv >= 0) {
    const Node& c = network_->nodes()[conv];
    s.conv.shape = shape_of(conv, end - begin);
    s.conv.shape.planar = c.x == 0 && input == Input::planar;
    s.conv.config = configs_[conv];
    s.conv.dtype = dtype;
    s.conv.packed = packed_[conv].get();
    s.conv.shift = c.shift.empty() ? nullptr : c.shift.data();
    s.conv.relu = c.relu;
  }
  const Extent& in = extents_[n.x];
  s.pool.dtype = dtype;
  s.pool.N = end - begin, s.pool.H = in.H, s.pool.W = in.W, s.pool.C = in.C, s.pool.P = out.H, s.pool.Q = out.W;
  s.pool.kernel_h = n.kernel.h, s.pool.kernel_w = n.kernel.w;
  s.pool.stride_h = n.stride.h, s.pool.stride_w = n.stride.w;
  s.pool.pad_h = n.padding.h, s.pool.pad_w = n.padding.w;
  s.pool.count_include_pad = n.count_include_pad;
  switch (n.op) {
    case Op::max_pool:
      s.kind = fused ? StepKind::conv_max_pool : StepKind::max_pool;
      break;
    case Op::avg_pool:
      s.kind = StepKind::avg_pool;
      break;
    case Op::global_avg_pool:
      s.kind = StepKind::global_avg_pool;
      break;
    case Op::scale:
      s.kind = StepKind::scale;
      break;
    case Op::add:
      s.kind = StepKind::add;
      break;
    case Op::relu:
      s.kind = StepKind::relu;
      break;
    case Op::sigmoid:
      s.kind = StepKind::sigmoid;
      break;
    default:
      s.kind = StepKind::conv;
  }
  if (fused) {
    ConvShape shape = band_shape(node, &s.band);
    s.row_bytes = round_up(shape.P * shape.Q * shape.K * int64_t(dtype_size(dtype)));
    for (; shape.P > 0; --shape.P) {  // a thread's last band is shorter
      const int64_t bytes = int64_t(kernels().conv->scratch_bytes(shape, dtype, s.conv.config, 1));
      s.scratch_bytes = std::max(s.scratch_bytes, round_up(bytes));
    }
  }
  return s;
}

// ---- running

void Plan::run(const void* x, bool nchw, DType x_dtype, void* out, double* ms) {
  RF_CHECK(x && out, "run: x and out must not be null");
  std::unique_ptr<Buffer> arena;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!arenas_.empty()) {
      arena = std::move(arenas_.back());
      arenas_.pop_back();
    }
  }
  if (!arena) arena = std::make_unique<Buffer>(arena_bytes_);
  // One channel or one pixel is the same memory in both layouts.
  const bool nhwc = !nchw || C() == 1 || H() * W() == 1;
  const bool same = x_dtype == network_->dtype();
  const Input input = same && nhwc ? Input::nhwc : same && planar_ ? Input::planar : Input::converted;
  const std::vector<Step>& steps = steps_[int(input)];
  rf::Program program;
  program.steps = steps.data();
  program.count = int(steps.size());
  program.threads = threads_;
  program.nchw = nchw;
  program.x_dtype = x_dtype;
  program.conv_run = kernels().conv->run;
  void* bases[int(Space::count)] = {};
  bases[int(Space::arena)] = arena->data();
  bases[int(Space::input)] = const_cast<void*>(x);
  bases[int(Space::output)] = out;
  if (ms) {
    std::vector<double> each(steps.size(), 0.0);
    kernels().network_run(program, bases, each.data());
    for (size_t i = 0; i < steps.size(); ++i) ms[steps[i].node] += each[i];
  } else {
    kernels().network_run(program, bases, nullptr);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(arena));
}

void Plan::profile(const void* x, bool nchw, DType x_dtype, void* out, int repeats) {
  RF_CHECK(repeats > 0, "profile: wanted at least one repeat, got ", repeats);
  const size_t count = network_->nodes().size();
  std::vector<std::vector<double>> runs(static_cast<size_t>(repeats), std::vector<double>(count, 0.0));
  run(x, nchw, x_dtype, out);  // warm: the arena's pages, the weights
  for (auto& each : runs) run(x, nchw, x_dtype, out, each.data());
  for (size_t i = 0; i < count; ++i) {
    std::vector<double> of;
    for (const auto& each : runs) of.push_back(each[i]);
    std::sort(of.begin(), of.end());
    if (of.back() <= 0) continue;  // no step of its own: read in place, or computed inside another
    ms_[i] = of[size_t(repeats / 2)];
    least_ms_[i] = of[0];
  }
}

void Plan::poison() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (arenas_.empty()) arenas_.push_back(std::make_unique<Buffer>(arena_bytes_));
  for (auto& arena : arenas_) std::memset(arena->data(), 0xff, arena->bytes());
}

std::vector<Plan::Row> Plan::describe() const {
  std::vector<Row> rows;
  for (int i = 0; i < int(extents_.size()); ++i) {
    if (!live_[i]) continue;
    const Node& n = network_->nodes()[i];
    Row r;
    r.node = i;
    r.op = op_name(n.op);
    r.in = i ? extents_[n.x] : extents_[i];
    r.out = extents_[i];
    if (is_conv(n)) {
      r.config = configs_[i];
      r.algorithm = kernels().conv->name(configs_[i].algorithm);
    }
    r.kernel = n.kernel, r.stride = n.stride, r.groups = n.groups;
    r.images = levels_[level_[i]].images;
    r.flops = flops_of(i);
    r.ms = ms_[i];
    r.least_ms = least_ms_[i];
    r.fused = fused_into_[i] >= 0;
    rows.push_back(r);
  }
  return rows;
}

Choices Plan::choices() const {
  Choices all;
  for (int i = 1; i < int(extents_.size()); ++i) {
    if (!live_[i]) continue;
    Choice c;
    c.images = levels_[level_[i]].images;
    if (is_conv(network_->nodes()[i])) {
      const ConvConfig& config = configs_[i];
      c.algorithm = kernels().conv->name(config.algorithm);
      c.block_rows = config.block_rows, c.block_cols = config.block_cols, c.split_cols = config.split_cols;
    }
    all[i] = c;
  }
  return all;
}

}  // namespace rf
