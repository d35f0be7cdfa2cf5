// Choosing by measurement, inside the network: every candidate runs between the steps it will run between, with the
// weights as cold and the maps as warm as they will be. (A loop over one convolution alone picks blocks that lose
// once the weights come from memory.) Convolutions of one kind share their measurements: while one tries one
// candidate, its twin tries another.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>
#include <tuple>

#include "cpu/kernels.h"
#include "network.h"

namespace rf {

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Tuner {
 public:
  Tuner(Plan& plan, const Choices& given, int effort)
      : plan_(plan),
        given_(given),
        effort_(effort),
        deadline_(now() + (effort > 1 ? 60.0 : 10.0)),
        x_(image_bytes()),
        out_(output_bytes()) {
    // Any finite values do, but zeros would hide what denormals or an all-zero ReLU change.
    uint32_t state = 1;
    for (size_t i = 0; i + 2 <= x_.bytes(); i += 2) {
      state = state * 1664525u + 1013904223u;
      const float value = float(int32_t(state)) * 4.6e-10f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t half = uint16_t(bits >> 16);  // bf16; a pair of them is as good a float
      std::memcpy(x_.data() + i, &half, 2);
    }
  }

  void run() {
    choose_passes();
    choose_configs();
    plan_.drop_arenas();
  }

 private:
  struct Kind {  // convolutions that differ only in their weights
    std::vector<int> members;
    std::vector<ConvConfig> candidates;  // the heuristic's first
    std::vector<double> best;            // least ms of each; kUntried
    std::vector<int> queue;              // candidates to be tried next
  };
  static constexpr double kUntried = 1e30;

  size_t image_bytes() const { return size_t(plan_.N_ * plan_.value_bytes(0)); }
  size_t output_bytes() const { return size_t(plan_.N_ * plan_.value_bytes(plan_.network_->output())); }
  bool late() const { return now() > deadline_; }

  double run_once(double* ms = nullptr) {
    const double before = now();
    plan_.run(x_.data(), false, plan_.network_->dtype(), out_.data(), ms);
    return now() - before;
  }

  // The least of a few runs: what interrupts a run only ever adds to it.
  double least(int repeats) {
    run_once();
    double best = run_once();
    for (int i = 1; i < repeats && !late(); ++i) best = std::min(best, run_once());
    return best;
  }

  void choose_passes() {
    if (plan_.N_ == 1) return;
    for (const auto& entry : given_) {
      if (entry.second.images > 0) return;
    }
    const std::vector<int64_t> start = plan_.images_;
    std::set<std::vector<int64_t>> tried;
    std::vector<int64_t> best = start;
    double best_time = 0;
    for (double factor : {1.0, 2.0, 0.5, 1e9}) {
      std::vector<int64_t> images = start;
      for (int64_t& n : images) n = std::max(int64_t(1), std::min(plan_.N_, int64_t(double(n) * factor)));
      if (!tried.insert(images).second) continue;
      if (late()) break;
      plan_.images_ = images;
      rebuild_choosing();
      const double time = least(2);
      if (tried.size() == 1 || time < best_time) best = images, best_time = time;
    }
    plan_.images_ = best;
    rebuild_choosing();
  }

  void rebuild_choosing() {
    plan_.find_levels();
    plan_.choose_convolutions(given_);
    plan_.build();
  }

  std::vector<Kind> find_kinds() {
    const ConvKernels& conv = *kernels().conv;
    const std::vector<Node>& nodes = plan_.network_->nodes();
    std::map<std::vector<int64_t>, Kind> kinds;
    for (int i = 0; i < int(nodes.size()); ++i) {
      if (!plan_.live_[i] || (nodes[i].op != Op::conv && nodes[i].op != Op::linear)) continue;
      const auto given = given_.find(i);
      if (given != given_.end() && !given->second.algorithm.empty()) continue;
      const ConvShape s = plan_.planned_shape(i);
      Kind& kind = kinds[{s.N, s.H, s.W, s.C, s.K, s.R, s.S, s.P, s.Q, s.stride_h, s.stride_w, s.pad_h, s.pad_w,
                          s.dilation_h, s.dilation_w, s.groups, plan_.fused_into_[i] >= 0}];
      kind.members.push_back(i);
      if (kind.members.size() > 1) continue;
      ConvConfig all[64];
      const int n =
          conv.candidates(s, plan_.network_->dtype(), plan_.fused_into_[i] >= 0 ? 1 : plan_.threads_, all, 64);
      kind.candidates.push_back(plan_.configs_[i]);
      for (int c = 0; c < n; ++c) {
        const bool barred = (plan_.exact_ && is_inexact(all[c].algorithm)) ||
                            (plan_.fused_into_[i] >= 0 && !is_by_rows(all[c].algorithm));
        const ConvConfig& first = kind.candidates[0];
        const bool again = std::tie(first.algorithm, first.block_rows, first.block_cols, first.split_cols) ==
                           std::tie(all[c].algorithm, all[c].block_rows, all[c].block_cols, all[c].split_cols);
        if (!barred && !again) kind.candidates.push_back(all[c]);
      }
    }
    std::vector<Kind> out;
    for (auto& entry : kinds) {
      entry.second.best.assign(entry.second.candidates.size(), kUntried);
      if (entry.second.candidates.size() > 1) out.push_back(std::move(entry.second));
    }
    return out;
  }

  void set(int node, const ConvConfig& config) {
    plan_.configs_[node] = config;
    plan_.packed_[node] = plan_.network_->packed(node, config.algorithm, plan_.planned_shape(node), plan_.threads_);
  }

  // The fastest; the heuristic's own unless something beats it by more than the clock's noise.
  static int winner(const Kind& kind) {
    const int best = int(std::min_element(kind.best.begin(), kind.best.end()) - kind.best.begin());
    return kind.best[size_t(best)] < 0.97 * kind.best[0] ? best : 0;
  }

  // Empties the queues: each run of the network tries one queued candidate in every convolution.
  void measure_queues(std::vector<Kind>& kinds) {
    const size_t count = plan_.network_->nodes().size();
    for (bool more = true; more && !late();) {
      more = false;
      std::vector<std::pair<Kind*, std::pair<int, int>>> trials;  // kind, (node, candidate)
      for (Kind& kind : kinds) {
        for (int node : kind.members) {
          int candidate = winner(kind);
          if (!kind.queue.empty()) {
            candidate = kind.queue.back();
            kind.queue.pop_back();
          }
          more = more || !kind.queue.empty();
          set(node, kind.candidates[size_t(candidate)]);
          trials.push_back({&kind, {node, candidate}});
        }
      }
      plan_.build();
      run_once();  // pages of a grown arena, packed weights out of the caches of the packing
      for (int repeat = 0; repeat < 2; ++repeat) {
        std::vector<double> ms(count, 0.0);
        run_once(ms.data());
        for (const auto& trial : trials) {
          // A convolution computed inside a max_pool is clocked with it.
          const int node = trial.second.first, clocked = plan_.fused_into_[node] >= 0 ? plan_.fused_into_[node] : node;
          double& best = trial.first->best[size_t(trial.second.second)];
          best = std::min(best, ms[size_t(clocked)]);
        }
      }
    }
  }

  template <class Wanted>
  void queue_where(std::vector<Kind>& kinds, const Wanted& wanted) {
    for (Kind& kind : kinds) {
      const double best = *std::min_element(kind.best.begin(), kind.best.end());
      for (int c = int(kind.candidates.size()) - 1; c >= 0; --c) {
        const bool first = c == 0 && kind.best[0] == kUntried;
        if (first || (kind.best[size_t(c)] == kUntried && wanted(kind, kind.candidates[size_t(c)], best)))
          kind.queue.push_back(c);
      }
    }
    measure_queues(kinds);
  }

  void choose_configs() {
    std::vector<Kind> kinds = find_kinds();
    if (kinds.empty()) return;
    const std::vector<ConvConfig> start = plan_.configs_;
    // First each algorithm and each way of sharing it with its default blocks; then the blocks of those within reach
    // of the best; then the best few again, until luck is out of it.
    queue_where(kinds, [](const Kind&, const ConvConfig& c, double) { return c.block_rows == 0 && c.block_cols == 0; });
    queue_where(kinds, [&](const Kind& kind, const ConvConfig& c, double best) {
      double family = kUntried;
      for (size_t i = 0; i < kind.candidates.size(); ++i) {
        const ConvConfig& other = kind.candidates[i];
        if (other.algorithm == c.algorithm && other.split_cols == c.split_cols) family = std::min(family, kind.best[i]);
      }
      return family < (effort_ > 1 ? 1.5 : 1.25) * best;
    });
    for (int round = 0; round < effort_; ++round) {
      for (Kind& kind : kinds) {
        std::vector<int> order(kind.candidates.size());
        for (int i = 0; i < int(order.size()); ++i) order[size_t(i)] = i;
        std::stable_sort(order.begin(), order.end(),
                         [&](int a, int b) { return kind.best[size_t(a)] < kind.best[size_t(b)]; });
        order.resize(std::min(order.size(), size_t(3)));
        kind.queue.assign(order.rbegin(), order.rend());
      }
      measure_queues(kinds);
    }
    for (Kind& kind : kinds) {
      for (int node : kind.members) set(node, kind.candidates[size_t(winner(kind))]);
    }
    plan_.build();
    keep_faster(start);
  }

  // The sum of the parts' winners is no promise: the whole must win too.
  void keep_faster(const std::vector<ConvConfig>& start) {
    const std::vector<ConvConfig> tuned = plan_.configs_;
    double times[2] = {1e30, 1e30};
    for (int round = 0; round < 2; ++round) {
      for (int which : {0, 1}) {
        apply(which ? tuned : start);
        run_once();
        for (int repeat = 0; repeat < 2; ++repeat) times[which] = std::min(times[which], run_once());
      }
    }
    if (times[0] < times[1]) apply(start);
  }

  void apply(const std::vector<ConvConfig>& configs) {
    for (int i = 0; i < int(configs.size()); ++i) {
      if (plan_.packed_[i]) set(i, configs[size_t(i)]);
    }
    plan_.build();
  }

  Plan& plan_;
  const Choices& given_;
  const int effort_;
  const double deadline_;
  Buffer x_, out_;
};

void tune_plan(Plan& plan, const Choices& given, int effort) { Tuner(plan, given, effort).run(); }

}  // namespace rf
