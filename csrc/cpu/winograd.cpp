// winograd_weight, winograd_convolution and winograd_weight_grad on the CPU.
#include "kernel_set.h"

#include "layout.h"

namespace emr::cpu {

namespace {

bool dense(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_contiguous(); }

// Of images x and what the convolution makes of them, y or its cotangent; without the pointers.
WinogradTask task_of(const Tensor& x, const Tensor& y, int64_t pad_height, int64_t pad_width) {
  STD_TORCH_CHECK(
      x.dim() == 4 && y.dim() == 4 && dense(x) && dense(y) && x.size(0) == y.size(0),
      "expected row-major float32 [N, H, W, C] and [N, OH, OW, K]");
  STD_TORCH_CHECK(
      pad_height >= 0 && pad_width >= 0 && y.size(1) == x.size(1) + 2 * pad_height - 2 &&
          y.size(2) == x.size(2) + 2 * pad_width - 2,
      "expected the output's size of a 3 by 3 convolution with stride 1");
  STD_TORCH_CHECK(x.size(3) % kUnit == 0 && y.size(3) % kUnit == 0, "expected multiples of 16 channels");
  WinogradTask task{};
  task.height = x.size(1);
  task.width = x.size(2);
  task.channels = x.size(3);
  task.out_height = y.size(1);
  task.out_width = y.size(2);
  task.out_channels = y.size(3);
  task.pad_height = pad_height;
  task.pad_width = pad_width;
  task.down = (task.out_height + kTileOut - 1) / kTileOut;
  task.across = (task.out_width + kTileOut - 1) / kTileOut;
  return task;
}

// Without the pointers. transposed: K rows and C columns, of kernels turned around.
WinogradWeightTask weight_task_of(const Tensor& kernels, bool transposed) {
  STD_TORCH_CHECK(
      kernels.dim() == 4 && kernels.size(2) == 3 && kernels.size(3) == 3 &&
          kernels.scalar_type() == ScalarType::Float,
      "expected a float32 weight [K, C, 3, 3]");
  const int rows = transposed ? 0 : 1, columns = 1 - rows, sign = transposed ? -1 : 1;
  WinogradWeightTask task{};
  task.rows = kernels.size(rows);
  task.columns = kernels.size(columns);
  task.panels = winograd_columns(task.columns) / kWinogradPanel;
  task.row_step = kernels.stride(rows);
  task.column_step = kernels.stride(columns);
  task.down_step = sign * kernels.stride(2);
  task.across_step = sign * kernels.stride(3);
  return task;
}

constexpr int64_t kWeightGrain = 1 + kBlock / (kTileProducts * kWinogradPanel);
// Tiles of a task, where there are as many.
constexpr int64_t kLeastTiles = 4;
// Floats of the tiles whose products are made at once.
constexpr int64_t kGradFloats = 1 << 21;

}  // namespace

void winograd_weight(const Tensor& packed, const Tensor& weight, bool transposed) {
  WinogradWeightTask task = weight_task_of(weight, transposed);
  STD_TORCH_CHECK(
      packed.dim() == 4 && dense(packed) && packed.size(0) == kTileProducts && packed.size(1) == task.panels &&
          packed.size(2) == task.rows && packed.size(3) == kWinogradPanel,
      "expected a row-major float32 result [36, panels, C, 32]");
  task.kernels = static_cast<const float*>(weight.const_data_ptr());
  if (transposed) {
    // From the last tap to the first.
    task.kernels -= 2 * (task.down_step + task.across_step);
  }
  task.weight = static_cast<float*>(packed.mutable_data_ptr());
  const WinogradWeightKernel kernel = kernel_set().winograd.weight;
  torch::stable::parallel_for(
      0, task.panels * task.rows, kWeightGrain, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void winograd_convolution(
    const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t pad_height,
    int64_t pad_width) {
  WinogradTask task = task_of(x, y, pad_height, pad_width);
  STD_TORCH_CHECK(
      weight.dim() == 4 && dense(weight) && weight.size(0) == kTileProducts &&
          weight.size(1) * kWinogradPanel == winograd_columns(task.out_channels) && weight.size(2) == task.channels &&
          weight.size(3) == kWinogradPanel,
      "expected the weight that winograd_weight makes");
  STD_TORCH_CHECK(!bias || (dense(*bias) && bias->numel() == task.out_channels), "expected a float32 bias [K]");
  if (y.numel() == 0) {
    return;
  }
  task.x = static_cast<const float*>(x.const_data_ptr());
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  task.y = static_cast<float*>(y.mutable_data_ptr());

  const int64_t tiles = x.size(0) * task.down * task.across;
  const int64_t threads = torch::stable::get_num_threads();
  // The same number of blocks, as nearly equal as can be, for each thread; but each reads the whole weight.
  const int64_t rounds = (tiles + kWinogradTiles * threads - 1) / (kWinogradTiles * threads);
  const int64_t blocks = std::min((tiles + kLeastTiles - 1) / kLeastTiles, rounds * threads);
  const WinogradKernel kernel = kernel_set().winograd.convolution;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(winograd_scratch(task, (tiles + blocks - 1) / blocks));
    for (int64_t block = begin; block < end; ++block) {
      kernel(task, scratch.get(), block * tiles / blocks, (block + 1) * tiles / blocks);
    }
  });
}

void winograd_weight_grad(
    const Tensor& grad, const Tensor& x, const Tensor& cotangent, int64_t pad_height, int64_t pad_width) {
  WinogradGradTask task{};
  task.images = task_of(x, cotangent, pad_height, pad_width);
  const int64_t channels = task.images.channels, out_channels = task.images.out_channels;
  WinogradWeightTask kernels = weight_task_of(grad, false);
  STD_TORCH_CHECK(
      kernels.rows == channels && kernels.columns == out_channels, "expected a gradient [K, C, 3, 3] of their channels");
  const int64_t tiles = x.size(0) * task.images.down * task.images.across;
  if (tiles == 0 || grad.numel() == 0) {
    torch::stable::fill_(grad, 0);
    return;
  }
  task.images.x = static_cast<const float*>(x.const_data_ptr());
  task.cotangent = static_cast<const float*>(cotangent.const_data_ptr());
  // Fixed, so that sums do not depend on the number of threads.
  const int64_t fitting = kGradFloats / (kTileProducts * (channels + out_channels));
  const int64_t most = std::min(tiles, std::max<int64_t>(64, fitting));
  const auto room = [&](int64_t columns) { return kTileProducts * winograd_stride(columns, most); };
  const Scratch<float> zeros(channels), values(room(channels)), cotangents(room(out_channels)),
      products(kTileProducts * winograd_columns(out_channels) * channels);
  std::fill_n(zeros.get(), channels, 0.0f);
  task.zeros = zeros.get();
  task.values = values.get();
  task.cotangents = cotangents.get();
  task.products = products.get();
  const WinogradKernels& run = kernel_set().winograd;
  for (task.first = 0; task.first < tiles; task.first += task.tiles) {
    task.tiles = std::min(most, tiles - task.first);
    torch::stable::parallel_for(
        0, task.tiles, 1, [&](int64_t begin, int64_t end) { run.grad_values(task, begin, end); });
    torch::stable::parallel_for(
        0, kTileProducts * kernels.panels, 1, [&](int64_t begin, int64_t end) { run.grad_products(task, begin, end); });
  }
  kernels.weight = products.get();
  float* const result = static_cast<float*>(grad.mutable_data_ptr());
  torch::stable::parallel_for(0, kernels.panels * kernels.rows, kWeightGrain, [&](int64_t begin, int64_t end) {
    run.grad_kernels(kernels, result, begin, end);
  });
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&emr::cpu::winograd_weight));
  m.impl("winograd_convolution", TORCH_BOX(&emr::cpu::winograd_convolution));
  m.impl("winograd_weight_grad", TORCH_BOX(&emr::cpu::winograd_weight_grad));
}
