// From a graph and one input size to a program: extents, passes over a few images at a time, memory, steps.
//
// Sub-batching: values are cut into levels of consecutive steps. A level computes `images` images at a time; one pass
// of it first runs the level before over the same images, in smaller passes. So the large early maps of an image or
// two stay in cache, while later levels, heavy with weights, run over the whole batch and read their weights once.
#include <algorithm>
#include <climits>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "network.h"

namespace rf {

static int64_t conv_extent(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// torch's rule: with ceil_mode the last window must begin inside the input or its left padding.
static int64_t pool_extent(int64_t in, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t room = in + 2 * padding - kernel;
  if (room < 0 && !(ceil_mode && room + stride > 0)) return 0;
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= in + padding) --out;
  return out;
}

static bool is_conv(const Node& n) { return n.op == Op::conv || n.op == Op::linear; }

bool is_inexact(int algorithm) {
  const char* name = kernels().conv->name(algorithm);
  return std::strncmp(name, "winograd", 8) == 0 || std::strcmp(name, "strassen") == 0;
}
bool is_by_rows(int algorithm) { return kernels().conv->tile_rows(algorithm) == 1; }

Plan::Plan(std::shared_ptr<Network> network, int64_t N, int64_t H, int64_t W, int threads, bool exact)
    : network_(std::move(network)), N_(N), threads_(threads), exact_(exact) {
  infer_extents(H, W);
  find_uses();
  ms_.assign(network_->nodes().size(), -1);
  least_ms_ = ms_;
}

void Plan::infer_extents(int64_t H, int64_t W) {
  const std::vector<Node>& nodes = network_->nodes();
  extents_.resize(nodes.size());
  for (int i = 0; i < int(nodes.size()); ++i) {
    const Node& n = nodes[i];
    const Extent in = i ? extents_[n.x] : Extent{H, W, n.channels};
    Extent out = {in.H, in.W, n.channels};
    switch (n.op) {
      case Op::linear:
        RF_CHECK(in.H == 1 && in.W == 1, "linear (value ", i, "): x must be 1x1, got ", in.H, "x", in.W,
                 ": pool it first");
        break;
      case Op::conv:
        out.H = conv_extent(in.H, n.kernel.h, n.stride.h, n.padding.h, n.dilation.h);
        out.W = conv_extent(in.W, n.kernel.w, n.stride.w, n.padding.w, n.dilation.w);
        break;
      case Op::max_pool:
      case Op::avg_pool:
        out.H = pool_extent(in.H, n.kernel.h, n.stride.h, n.padding.h, n.ceil_mode);
        out.W = pool_extent(in.W, n.kernel.w, n.stride.w, n.padding.w, n.ceil_mode);
        break;
      case Op::global_avg_pool:
        out.H = out.W = 1;
        break;
      default:
        break;
    }
    RF_CHECK(out.H > 0 && out.W > 0, op_name(n.op), " (value ", i, "): an input of ", in.H, "x", in.W,
             " is smaller than the kernel of ", n.kernel.h, "x", n.kernel.w, " needs");
    if (n.residual >= 0) {
      const Extent& r = extents_[n.residual];
      RF_CHECK(r.H == out.H && r.W == out.W, op_name(n.op), " (value ", i, "): the residual is ", r.H, "x", r.W,
               ", the output ", out.H, "x", out.W);
    }
    if (n.gate >= 0) {
      const Extent& g = extents_[n.gate];
      RF_CHECK(g.H == 1 && g.W == 1, "scale (value ", i, "): the gate must be 1x1, got ", g.H, "x", g.W);
    }
    int64_t bytes;
    const bool huge = __builtin_mul_overflow(out.H, out.W, &bytes) ||
                      __builtin_mul_overflow(bytes, out.C * 4, &bytes) || __builtin_mul_overflow(bytes, N_, &bytes) ||
                      bytes > (int64_t(1) << 46);
    RF_CHECK(!huge, op_name(n.op), " (value ", i, "): ", N_, " images of ", out.H, "x", out.W, "x", out.C,
             " cannot be addressed");
    extents_[i] = out;
  }
}

void Plan::find_uses() {
  const std::vector<Node>& nodes = network_->nodes();
  const int count = int(nodes.size());
  live_.assign(count, false);
  readers_.assign(count, {});
  fused_into_.assign(count, -1);
  live_[network_->output()] = true;
  for (int i = count - 1; i >= 0; --i) {
    if (!live_[i]) continue;
    for (int v : {nodes[i].x, nodes[i].gate, nodes[i].residual}) {
      if (v < 0) continue;
      live_[v] = true;
      if (readers_[v].empty() || readers_[v].back() != i) readers_[v].push_back(i);
    }
  }
  live_[0] = true;
  for (auto& readers : readers_) std::sort(readers.begin(), readers.end());
  // A convolution that only a max_pool reads is computed inside it, rows at a time. Not by tiles of several rows: a
  // band's begin where a thread's share does, and the bits of the result would depend on how many threads there are.
  for (int i = 0; i < count; ++i) {
    const Node& n = nodes[i];
    const bool alone = live_[i] && n.op == Op::conv && i != network_->output() && readers_[i].size() == 1;
    if (!alone || n.residual >= 0 || nodes[readers_[i][0]].op != Op::max_pool) continue;
    if (n.padding.h > n.dilation.h * (n.kernel.h - 1)) continue;  // a band of rows could lie in the padding alone
    if (!is_by_rows(kernels().conv->heuristic(shape_of(i, 1), network_->dtype(), threads_, exact_).algorithm)) continue;
    const int pool = readers_[i][0];
    fused_into_[i] = pool;
    for (int& reader : readers_[n.x]) reader = reader == i ? pool : reader;
    std::sort(readers_[n.x].begin(), readers_[n.x].end());
  }
}

ConvShape Plan::shape_of(int node, int64_t images) const {
  const Node& n = network_->nodes()[node];
  const Extent &in = extents_[n.x], &out = extents_[node];
  ConvShape s;
  s.N = images, s.H = in.H, s.W = in.W, s.C = in.C;
  s.K = n.channels, s.R = n.kernel.h, s.S = n.kernel.w;
  s.P = out.H, s.Q = out.W;
  s.stride_h = n.stride.h, s.stride_w = n.stride.w;
  s.pad_h = n.padding.h, s.pad_w = n.padding.w;
  s.dilation_h = n.dilation.h, s.dilation_w = n.dilation.w;
  s.groups = n.groups;
  return s;
}

ConvShape Plan::planned_shape(int node) const {
  return fused_into_[node] >= 0 ? band_shape(fused_into_[node], nullptr) : shape_of(node, levels_[level_[node]].images);
}

double Plan::flops_of(int node) const {
  const Node& n = network_->nodes()[node];
  if (!is_conv(n)) return 0;
  return 2.0 * double(N_) * double(extents_[node].H * extents_[node].W) * double(n.weight.size());
}

// Images a pass of each stage covers, so that weights and activations cost about the same traffic: a stage whose
// weights weigh as much as the maps of s images gains nothing from passes smaller than s, which would read them again.
// A stage: the values from which on no map is larger. Passes never shrink along the network.
void Plan::choose_images() {
  const std::vector<Node>& nodes = network_->nodes();
  const int count = int(nodes.size());
  std::vector<int64_t> area(count);
  int64_t largest = 0;
  for (int i = count - 1; i >= 0; --i) {
    if (live_[i] && fused_into_[i] < 0) largest = std::max(largest, extents_[i].H * extents_[i].W);
    area[i] = largest;
  }
  images_.assign(count, 1);
  int64_t before = 1;
  for (int first = 0; first < count;) {
    int last = first;
    double weights = 0, maps = 0;
    for (; last < count && area[last] == area[first]; ++last) {
      const Node& n = nodes[last];
      if (!live_[last] || n.x < 0) continue;
      // Winograd packs 3x3 filters about fourfold; what counts is what a pass reads.
      const double growth = n.kernel.h == 3 && n.stride.h == 1 ? 4 : 1;
      weights += double(n.weight.size()) * double(dtype_size(network_->dtype())) * growth;
      maps += double(value_bytes(last)) + double(value_bytes(n.x)) + (n.residual >= 0 ? double(value_bytes(last)) : 0);
    }
    const int64_t balanced = maps > 0 ? int64_t(weights / maps + 0.5) : 1;
    before = std::min(N_, std::max({before, balanced, int64_t(1)}));
    if (2 * before > N_) before = N_;
    for (int i = first; i < last; ++i) images_[i] = before;
    first = last;
  }
}

void Plan::choose_convolutions(const Choices& choices) {
  const std::vector<Node>& nodes = network_->nodes();
  const ConvKernels& conv = *kernels().conv;
  const DType dtype = network_->dtype();
  configs_.resize(nodes.size());
  packed_.resize(nodes.size());
  for (int i = 0; i < int(nodes.size()); ++i) {
    if (!live_[i] || !is_conv(nodes[i])) continue;
    const ConvShape shape = planned_shape(i);
    ConvConfig& config = configs_[i];
    const auto choice = choices.find(i);
    if (choice == choices.end() || choice->second.algorithm.empty()) {
      config = conv.heuristic(shape, dtype, fused_into_[i] >= 0 ? 1 : threads_, exact_);
    } else {
      const Choice& c = choice->second;
      int algorithm = 0;
      while (algorithm < conv.algorithms() && c.algorithm != conv.name(algorithm)) ++algorithm;
      RF_CHECK(algorithm < conv.algorithms(), "choices[", i, "]: no convolution algorithm is called '", c.algorithm,
               "'");
      const char* why = conv.why_not(shape, dtype, algorithm);
      RF_CHECK(!why, "choices[", i, "]: ", c.algorithm, " cannot do this convolution: ", why);
      RF_CHECK(!exact_ || !is_inexact(algorithm), "choices[", i, "]: ", c.algorithm,
               " is not exact, and exact was asked for");
      RF_CHECK(fused_into_[i] < 0 || is_by_rows(algorithm), "choices[", i, "]: ", c.algorithm,
               " cannot compute the rows of a max_pool (value ", fused_into_[i], ")");
      RF_CHECK(c.block_rows >= 0 && c.block_cols >= 0 && c.split_cols >= 0, "choices[", i,
               "]: block sizes cannot be negative");
      config = {algorithm, c.block_rows, c.block_cols, c.split_cols};
    }
    packed_[i] = network_->packed(i, config.algorithm, shape, threads_);
  }
}

// Whether all that read the input can read NCHW as it stands.
bool Plan::reads_planar() const {
  for (int reader : readers_[0]) {
    const Node& n = network_->nodes()[reader];
    const int conv = is_conv(n) ? reader : n.op == Op::max_pool && fused_into_[n.x] == reader ? n.x : -1;
    if (conv < 0 || n.residual == 0) return false;
    ConvShape s = shape_of(conv, 1);
    s.planar = true;
    if (kernels().conv->why_not(s, network_->dtype(), configs_[conv].algorithm)) return false;
  }
  return true;
}

std::shared_ptr<Plan> Network::plan(int64_t N, int64_t H, int64_t W, int threads, bool exact, int tune,
                                    const Choices& choices) {
  RF_CHECK(output_ >= 0, "plan: the network has no output yet");
  RF_CHECK(N > 0 && H > 0 && W > 0, "plan: wanted at least one image of at least one pixel, got ", N, " of ", H, "x",
           W);
  RF_CHECK(threads > 0 && threads <= 1024, "plan: wanted 1 to 1024 threads, got ", threads);
  RF_CHECK(tune >= 0 && tune <= 2, "plan: tune is 0, 1 or 2, got ", tune);
  for (const auto& entry : choices) {
    check_value("choices", entry.first);
    const Op op = nodes_[entry.first].op;
    RF_CHECK(entry.second.algorithm.empty() || op == Op::conv || op == Op::linear, "choices[", entry.first, "]: a ",
             op_name(op), " has no algorithm to choose");
    RF_CHECK(entry.second.images >= 0, "choices[", entry.first, "]: images cannot be negative, got ",
             entry.second.images);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    planned_ = true;
  }
  auto plan = std::shared_ptr<Plan>(new Plan(shared_from_this(), N, H, W, threads, exact));
  plan->choose_images();
  for (const auto& entry : choices) {
    if (entry.second.images == 0) continue;
    plan->images_[entry.first] = entry.second.images;
    const int pool = plan->fused_into_[entry.first];  // one step: what is said of either holds for both
    if (pool >= 0 && !choices.count(pool)) plan->images_[pool] = entry.second.images;
  }
  plan->find_levels();
  plan->choose_convolutions(choices);
  plan->build();
  if (tune > 0) tune_plan(*plan, choices, tune);
  return plan;
}

// ---- the schedule

void Plan::build() {
  find_groups();
  place_values();
  planar_ = reads_planar();
  for (Input input : {Input::nhwc, Input::planar, Input::converted}) {
    std::vector<Step>& steps = steps_[int(input)];
    steps.clear();
    if (input != Input::planar || planar_) emit(steps, int(levels_.size()) - 1, 0, N_, input);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& arena : arenas_) {
    if (arena && arena->bytes() < arena_bytes_) arena = std::make_unique<Buffer>(arena_bytes_);
  }
  arenas_.reserve(64);
}

void Plan::drop_arenas() {
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_.clear();
}

void Plan::find_levels() {
  const int count = int(network_->nodes().size());
  levels_.clear();
  level_.assign(count, 0);
  store_.assign(count, 0);
  int64_t before = 1;
  for (int i = 0; i < count; ++i) {
    if (!live_[i]) continue;
    const int at = fused_into_[i] >= 0 ? fused_into_[i] : i;
    // The input's own step is a copy: it goes with its first reader.
    const int64_t wanted = i == 0 ? 1 : images_[at];
    before = std::min(N_, std::max(before, wanted));
    if (i == 0) continue;
    if (levels_.empty() || levels_.back().images != before) levels_.push_back({levels_.empty() ? 0 : i, i, before});
    levels_.back().last = i;
    level_[i] = int(levels_.size()) - 1;
  }
  for (int i = 0; i < count; ++i) {
    store_[i] = level_[i];
    for (int reader : readers_[i]) store_[i] = std::max(store_[i], level_[reader]);
  }
}

void Plan::find_groups() {
  const std::vector<Node>& nodes = network_->nodes();
  group_.assign(nodes.size(), 0);
  int group = 0, group_begin = 0, level = 0;
  for (int i = 0; i < int(nodes.size()); ++i) {
    if (!live_[i] || fused_into_[i] >= 0) continue;
    const Node& n = nodes[i];
    int x = n.x;
    if (x >= 0 && fused_into_[x] == i) x = nodes[x].x;
    bool depends = level_[i] != level;
    for (int v : {x, n.gate, n.residual}) depends = depends || v >= group_begin;
    if (i > 0 && depends) {
      ++group;
      group_begin = i;
    }
    level = level_[i];
    group_[i] = group;
  }
}

int64_t Plan::scratch_bytes(int node) const {
  const Node& n = network_->nodes()[node];
  const ConvKernels& conv = *kernels().conv;
  const DType dtype = network_->dtype();
  if (is_conv(n)) {
    size_t most = 0;  // the last pass may be a smaller one, and need more: its threads may share otherwise
    for (int64_t images = 1; images <= levels_[level_[node]].images; ++images) {
      most = std::max(most, conv.scratch_bytes(shape_of(node, images), dtype, configs_[node], threads_));
    }
    return int64_t(most);
  }
  if (n.op == Op::max_pool && fused_into_[n.x] == node) {
    const Step s = step_of(node, 0, 1, Input::converted);
    return threads_ * (s.row_bytes + s.scratch_bytes);
  }
  return 0;
}

}  // namespace rf
