// A linear layer with a 2:4 weight on an NVIDIA GPU: the kernels of ../../cuda/csrc, whose code the model itself
// holds, on the stream that ONNX Runtime works on.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "custom_op.h"

#ifndef CAST24_GPU_PROVIDER
#define CAST24_GPU_PROVIDER "CUDAExecutionProvider"
#endif

namespace cast24 {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A kernel of small_m.py, small_m_<column tiles>_<row tiles>_<warps>_<warps along K>_<depth>_<blocks>, or of tiled.py,
// tiled_<column tiles>_<row tiles>_<warps along M>_<warps along N>_<blocks>.
struct GpuKernel {
  std::string name;
  int64_t column_tiles, row_tiles, warps, blocks;
  int64_t warps_k = 1, depth = 1;            // small_m
  int64_t warps_m = 0, warps_n = 0;          // tiled
  bool tiled() const { return warps_m > 0; }
  int64_t rows() const { return 8 * column_tiles * warps_m; }  // of y, that a block makes
  int64_t columns() const { return 16 * row_tiles * warps_n; }
  int64_t tiles() const { return column_tiles * row_tiles * warps / warps_k; }  // of 16 x 8 sums, of a block

  // Those that PTX has: small_m for ever more rows of x, then tiled.
  static std::vector<GpuKernel> in(const char* code) {
    static const std::string kEntry = ".entry ";
    std::vector<GpuKernel> found;
    for (const char* at = std::strstr(code, kEntry.c_str()); at != nullptr; at = std::strstr(at, kEntry.c_str())) {
      at += kEntry.size();
      GpuKernel kernel;
      kernel.name = std::string(at, std::strcspn(at, "( \n"));
      long long n[6];
      const char* name = kernel.name.c_str();
      if (std::sscanf(name, "small_m_%lld_%lld_%lld_%lld_%lld_%lld", n, n + 1, n + 2, n + 3, n + 4, n + 5) == 6) {
        kernel.warps = n[2], kernel.warps_k = n[3], kernel.depth = n[4], kernel.blocks = n[5];
      } else if (std::sscanf(name, "tiled_%lld_%lld_%lld_%lld_%lld", n, n + 1, n + 2, n + 3, n + 4) == 5) {
        kernel.warps = n[2] * n[3], kernel.warps_m = n[2], kernel.warps_n = n[3], kernel.blocks = n[4];
      } else {
        continue;
      }
      kernel.column_tiles = n[0], kernel.row_tiles = n[1];
      found.push_back(kernel);
    }
    require(!found.empty(), "the code has no kernel small_m_*");
    std::sort(found.begin(), found.end(), [](const GpuKernel& a, const GpuKernel& b) {
      return std::make_pair(a.tiled(), a.column_tiles) < std::make_pair(b.tiled(), b.column_tiles);
    });
    require(!found.front().tiled(), "the code has no kernel small_m_*");
    return found;
  }
};

// How a call is cut into blocks, as by plan() of small_m.py or, for more rows than fit one block of those kernels, of
// tiled.py.
struct GpuPlan {
  const GpuKernel* kernel = nullptr;
  int64_t grid[3], row_tiles, steps, steps_per_split;

  // weight_bytes: of a row in a step of 64 columns.
  GpuPlan(const std::vector<GpuKernel>& kernels, int64_t M, int64_t N, int64_t K, int64_t weight_bytes, int multiprocessors)
      : row_tiles(ceil_div(N, 16)), steps(ceil_div(K, 64)) {
    for (const GpuKernel& each : kernels)
      if (!each.tiled() && (kernel == nullptr || 8 * kernel->column_tiles < M)) kernel = &each;
    if (8 * kernel->column_tiles < M) {
      int64_t least = 0;
      for (const GpuKernel& each : kernels) {
        if (!each.tiled()) continue;
        const GpuPlan plan(each, M, N, K, multiprocessors);
        const int64_t bytes = plan.tiled_bytes(weight_bytes, multiprocessors);
        if (least > 0 && bytes >= least) continue;
        *this = plan;
        least = bytes;
      }
    }
    if (kernel->tiled()) return;
    grid[0] = ceil_div(row_tiles * kernel->warps_k, kernel->row_tiles * kernel->warps);
    grid[2] = ceil_div(M, 8 * kernel->column_tiles);
    const int64_t wanted = kernel->blocks * multiprocessors / (grid[0] * grid[2]);
    split(std::min(wanted, steps / (kernel->depth * kernel->warps_k)));
  }

  int64_t splits() const { return grid[1]; }
  size_t partial_bytes() const {
    if (splits() == 1) return 0;
    const int64_t tiles = kernel->tiled() ? grid[0] * grid[2] * kernel->tiles() : grid[2] * row_tiles * kernel->column_tiles;
    return 512 * tiles * splits();
  }
  size_t counter_bytes() const { return splits() == 1 ? 0 : 4 * grid[0] * grid[2]; }

  // No plan with splits needs more, whatever M, N and K: its blocks are then at most `blocks` for each multiprocessor.
  static size_t most_partial_bytes(const std::vector<GpuKernel>& kernels, int multiprocessors) {
    size_t most = 0;
    for (const GpuKernel& k : kernels) most = std::max<size_t>(most, k.blocks * multiprocessors * k.tiles() * 512);
    return most;
  }
  static size_t most_counter_bytes(const std::vector<GpuKernel>& kernels, int multiprocessors) {
    size_t most = 0;
    for (const GpuKernel& k : kernels) most = std::max<size_t>(most, 4 * k.blocks * multiprocessors);
    return most;
  }

 private:
  // Into tiles.
  GpuPlan(const GpuKernel& tile, int64_t M, int64_t N, int64_t K, int multiprocessors)
      : kernel(&tile), row_tiles(ceil_div(N, 16)), steps(ceil_div(K, 64)) {
    grid[0] = ceil_div(M, tile.rows());
    grid[2] = ceil_div(N, tile.columns());
    split(std::min(multiprocessors / (grid[0] * grid[2]), steps / 4));
  }
  void split(int64_t wanted) {
    steps_per_split = ceil_div(steps, std::max<int64_t>(1, wanted));
    grid[1] = ceil_div(steps, steps_per_split);
  }
  // Work.bytes of tiled.py.
  int64_t tiled_bytes(int64_t weight_bytes, int multiprocessors) const {
    const int64_t sums = splits() > 1 ? 4 * kernel->rows() * kernel->columns() * (1 + splits()) : 0;
    const int64_t of_step = 128 * kernel->rows() + weight_bytes * kernel->columns();
    return ceil_div(grid[0] * grid[1] * grid[2], multiprocessors) * (steps_per_split * of_step + sums);
  }
};

// The kernels of one code in one context, and memory for the sums of splits. Made when a node runs first, which ONNX Runtime
// does before it captures a graph, and kept for the process: graphs hold on to it.
class GpuKernels {
 public:
  // Of the current context.
  static GpuKernels& of(const std::string& code) {
    static std::mutex mutex;
    static std::map<std::pair<void*, std::string>, std::unique_ptr<GpuKernels>> made;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& kernels = made[{CudaDriver::get().current_context(), code}];
    if (kernels == nullptr) kernels.reset(new GpuKernels(code));
    return *kernels;
  }

  // The same for all nodes on a stream, which run one after the other; a kernel leaves counters at 0.
  struct Workspace {
    char* counters;
    char* partial;
  };
  Workspace workspace(const GpuPlan& plan, void* stream) {
    const size_t most_counters = GpuPlan::most_counter_bytes(linear, multiprocessors);
    const size_t most_partial = GpuPlan::most_partial_bytes(linear, multiprocessors);
    require(plan.counter_bytes() <= most_counters && plan.partial_bytes() <= most_partial, "the plan needs too much memory");
    const std::lock_guard<std::mutex> lock(mutex_);
    Workspace& workspace = workspaces_[stream];
    if (workspace.counters == nullptr) {
      const size_t counters = (most_counters + 255) / 256 * 256;
      workspace.counters = static_cast<char*>(driver_.allocate(counters + most_partial, stream));
      workspace.partial = workspace.counters + counters;
    }
    return workspace;
  }
  void launch(const GpuPlan& plan, void* stream, const void* argument) {
    const unsigned grid[] = {static_cast<unsigned>(plan.grid[0]), static_cast<unsigned>(plan.grid[1]),
                             static_cast<unsigned>(plan.grid[2])};
    driver_.launch(functions_.at(plan.kernel->name), grid, static_cast<unsigned>(32 * plan.kernel->warps), stream, argument);
  }

  const std::vector<GpuKernel> linear;
  const int multiprocessors;

 private:
  explicit GpuKernels(const std::string& code)
      : linear(GpuKernel::in(code.c_str())), multiprocessors(CudaDriver::get().multiprocessors()), driver_(CudaDriver::get()) {
    void* module = driver_.load_module(code.c_str());
    for (const GpuKernel& kernel : linear) functions_[kernel.name] = driver_.function(module, kernel.name);
  }

  const CudaDriver& driver_;
  std::map<std::string, void*> functions_;
  std::mutex mutex_;
  std::map<void*, Workspace> workspaces_;
};

// y[..., N] = x[..., K] W^T + bias, float16. `weight` is bytes in the order of the fragments (layout.py): kept values of
// `bits` bits each, metadata, and for 8 and 4 bits scales (weight_only.py), one for each group_size columns or, if that is
// 0, each row. `code` is PTX, shared by all nodes of a model.
struct Sparse24MatMulGpu {
  static constexpr const char* provider = CAST24_GPU_PROVIDER;
  static constexpr OrtElementType output = kFloat16;
  static constexpr const char* name = "Sparse24MatMulGpu";
  static constexpr Input inputs[] = {
      {kFloat16, kRequired}, {kUint8, kRequired}, {kUint8, kRequired, kCpuMemory}, {kFloat16, kOptional}};

  int64_t N, K, bits, groups, group_steps;
  std::string code;
  mutable std::atomic<GpuKernels*> kernels{nullptr};

  explicit Sparse24MatMulGpu(const Attributes& attributes)
      : N(attributes.integer("N")), K(attributes.integer("K")), bits(attributes.integer("bits")) {
    require(N > 0 && K > 0 && K % 8 == 0, "attribute N must be positive and K a positive multiple of 8");
    require(bits == 16 || bits == 8 || bits == 4, "attribute bits must be 16, 8 or 4");
    const int64_t group = attributes.integer("group_size", 0);
    require(group >= 0 && group % 64 == 0, "attribute group_size must be 0 or a multiple of 64");
    groups = group == 0 ? 1 : ceil_div(K, group);
    group_steps = group == 0 ? ceil_div(K, 64) : group / 64;
    const Tensor text = attributes.constant(2);
    require(static_cast<bool>(text), "the kernels' code must be a constant");
    const char* first = static_cast<const char*>(text.data);
    code.assign(first, std::find(first, first + text.size(), '\0'));
  }

  // Returns the bytes of the weights.
  int64_t run(Context& context) const {
    const Tensor x = context.input(0), weight = context.input(1), bias = context.input(3);
    require_columns(x, K);
    if (bias) require_shape("bias", bias, {N});
    const int64_t lanes = 32 * ceil_div(N, 16) * ceil_div(K, 64);
    const int64_t values = lanes * 2 * bits, metadata = lanes * 4;
    const int64_t scales = bits == 16 ? 0 : ceil_div(N, 16) * groups * 16 * 4;
    require_shape("weight", weight, {values + metadata + scales});
    require(aligned(weight) && aligned(x), "x and weight must start at multiples of 16 bytes");

    std::vector<int64_t> shape = x.shape;
    shape.back() = N;
    void* y = context.output_data(0, shape);
    const int64_t bytes = weight.size() + (bias ? 2 * N : 0), M = x.size() / K;
    if (M == 0) return bytes;

    GpuKernels* loaded = kernels;
    if (loaded == nullptr) kernels = loaded = &GpuKernels::of(code);
    const GpuPlan plan(loaded->linear, M, N, K, 4 * bits + 8, loaded->multiprocessors);
    void* stream = context.stream();
    char* first = static_cast<char*>(weight.data);
    Arguments arguments{first, first + values, x.data};
    if (bits != 16) arguments.w_scale = first + values + metadata;
    arguments.bias = bias.data;
    arguments.y = y;
    if (plan.splits() > 1) {
      const GpuKernels::Workspace workspace = loaded->workspace(plan, stream);
      arguments.partial = workspace.partial;
      arguments.counters = workspace.counters;
    }
    arguments.x_stride = 2 * K;
    arguments.M = static_cast<int>(M);
    arguments.N = static_cast<int>(N);
    arguments.K = static_cast<int>(K);
    arguments.row_tiles = static_cast<int>(plan.row_tiles);
    arguments.steps = static_cast<int>(plan.steps);
    arguments.steps_per_split = static_cast<int>(plan.steps_per_split);
    arguments.groups = static_cast<int>(groups);
    arguments.group_steps = static_cast<int>(group_steps);
    loaded->launch(plan, stream, &arguments);
    return bytes;
  }

 private:
  static bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0; }

  // LinearArguments of small_m.cuh.
  struct Arguments {
    const void *values, *metadata, *x;
    const void *x_scale = nullptr, *w_scale = nullptr, *bias = nullptr;
    void *y = nullptr, *partial = nullptr, *counters = nullptr;
    int64_t x_stride = 0;
    int M = 0, N = 0, K = 0, row_tiles = 0, steps = 0, steps_per_split = 0, groups = 1, group_steps = 1;
  };
  static_assert(sizeof(Arguments) == 10 * 8 + 8 * 4, "no padding");
};

}  // namespace cast24
