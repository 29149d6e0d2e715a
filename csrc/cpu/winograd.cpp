// winograd_weight and winograd_convolution on the CPU.
#include "winograd.h"

#include "layout.h"

namespace emr::cpu {

void winograd_weight(const Tensor& packed, const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
      "expected a float32 weight [K, C, 3, 3]");
  WinogradWeightTask task{};
  task.rows = weight.size(transposed ? 0 : 1);
  task.columns = weight.size(transposed ? 1 : 0);
  task.panels = winograd_columns(task.columns) / kWinogradPanel;
  STD_TORCH_CHECK(
      packed.dim() == 4 && packed.size(0) == kTileProducts && packed.size(1) == task.panels &&
          packed.size(2) == task.rows && packed.size(3) == kWinogradPanel && packed.is_contiguous() &&
          packed.scalar_type() == ScalarType::Float,
      "expected a row-major float32 result [36, panels, C, 32]");
  task.kernels = static_cast<const float*>(weight.const_data_ptr());
  task.weight = static_cast<float*>(packed.mutable_data_ptr());
  task.row_step = weight.stride(transposed ? 0 : 1);
  task.column_step = weight.stride(transposed ? 1 : 0);
  task.down_step = weight.stride(2);
  task.across_step = weight.stride(3);
  if (transposed) {
    // The kernels turned around: from the last tap to the first.
    task.kernels += 2 * (task.down_step + task.across_step);
    task.down_step = -task.down_step;
    task.across_step = -task.across_step;
  }
  const WinogradWeightKernel kernel = winograd_kernels().weight;
  const int64_t grain = 1 + kBlock / (kTileProducts * kWinogradPanel);
  torch::stable::parallel_for(
      0, task.panels * task.rows, grain, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void winograd_convolution(
    const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t pad_height,
    int64_t pad_width) {
  const auto dense = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_contiguous(); };
  STD_TORCH_CHECK(
      x.dim() == 4 && y.dim() == 4 && weight.dim() == 4 && dense(x) && dense(y) && dense(weight),
      "expected row-major float32 y [N, OH, OW, K], x [N, H, W, C] and weight [36, panels, C, 32]");
  const int64_t channels = x.size(3), out_channels = y.size(3);
  STD_TORCH_CHECK(
      y.size(0) == x.size(0) && pad_height >= 0 && pad_width >= 0 && y.size(1) == x.size(1) + 2 * pad_height - 2 &&
          y.size(2) == x.size(2) + 2 * pad_width - 2,
      "expected the output's size of a 3 by 3 convolution with stride 1");
  STD_TORCH_CHECK(
      channels % kUnit == 0 && out_channels % kUnit == 0 && weight.size(0) == kTileProducts &&
          weight.size(1) * kWinogradPanel == winograd_columns(out_channels) && weight.size(2) == channels &&
          weight.size(3) == kWinogradPanel,
      "expected multiples of 16 channels and the weight that winograd_weight makes of them");
  STD_TORCH_CHECK(!bias || (dense(*bias) && bias->numel() == out_channels), "expected a float32 bias [K]");
  if (y.numel() == 0) {
    return;
  }
  WinogradTask task{};
  task.x = static_cast<const float*>(x.const_data_ptr());
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  task.y = static_cast<float*>(y.mutable_data_ptr());
  task.height = x.size(1);
  task.width = x.size(2);
  task.channels = channels;
  task.out_height = y.size(1);
  task.out_width = y.size(2);
  task.out_channels = out_channels;
  task.pad_height = pad_height;
  task.pad_width = pad_width;
  task.down = (task.out_height + kTileOut - 1) / kTileOut;
  task.across = (task.out_width + kTileOut - 1) / kTileOut;

  const int64_t tiles = x.size(0) * task.down * task.across;
  const int64_t threads = torch::stable::get_num_threads();
  // The same number of blocks, as nearly equal as can be, for each thread.
  const int64_t rounds = (tiles + kWinogradTiles * threads - 1) / (kWinogradTiles * threads);
  const int64_t blocks = std::min(tiles, rounds * threads);
  const WinogradKernel kernel = winograd_kernels().convolution;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(winograd_scratch(task, (tiles + blocks - 1) / blocks));
    for (int64_t block = begin; block < end; ++block) {
      kernel(task, scratch.get(), block * tiles / blocks, (block + 1) * tiles / blocks);
    }
  });
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&emr::cpu::winograd_weight));
  m.impl("winograd_convolution", TORCH_BOX(&emr::cpu::winograd_convolution));
}
