// The interface between the operators of Winograd convolutions and their kernels, one for each instruction set.
#pragma once

#include "kernels.h"

namespace emr {

// A tile is 4 by 4 outputs, from 6 by 6 inputs; [6 * 6] products of matrices make it.
inline constexpr int kTileOut = 4;
inline constexpr int kTileIn = 6;
inline constexpr int kTileProducts = kTileIn * kTileIn;
// Columns of the transformed weight that lie side by side.
inline constexpr int64_t kWinogradPanel = 32;
// Tiles that one task holds at most; it reads the whole weight for them.
inline constexpr int64_t kWinogradTiles = 28;

// y [N, OH, OW, K] of x [N, H, W, C], C and K multiples of kUnit.
struct WinogradTask {
  const float* x;
  const float* weight;  // [kTileProducts, ceil(K / kWinogradPanel), C, kWinogradPanel]
  const float* bias;    // [K]; null: none
  float* y;
  int64_t height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t pad_height, pad_width;
  int64_t down, across;  // tiles of an image
};

// Floats between the products of a task: seldom a multiple of a page, so that a tile's do not share one cache set. What
// is added is also what a panel that is half empty reads beyond the last row.
inline int64_t winograd_stride(int64_t columns, int64_t tiles) { return columns * tiles + kUnit; }
inline int64_t winograd_columns(int64_t out_channels) {
  return (out_channels + kWinogradPanel - 1) / kWinogradPanel * kWinogradPanel;
}
inline int64_t winograd_scratch(const WinogradTask& task, int64_t tiles) {
  return task.channels + tiles + kTileProducts * (winograd_stride(task.channels, tiles) +
                                          winograd_stride(winograd_columns(task.out_channels), tiles));
}

// Tiles [begin, end), counted over all images; scratch: winograd_scratch(task, end - begin) floats.
using WinogradKernel = void (*)(const WinogradTask&, float* scratch, int64_t begin, int64_t end);


// The weight of a WinogradTask from kernels of 3 by 3 pixels, C rows and K columns in any order of memory.
struct WinogradWeightTask {
  const float* kernels;
  float* weight;
  int64_t rows, columns, panels;
  int64_t row_step, column_step, down_step, across_step;
};
// Rows [begin, end), counted over all panels.
using WinogradWeightKernel = void (*)(const WinogradWeightTask&, int64_t begin, int64_t end);

// The gradient of those kernels, from images and cotangents of the output, tiles [first, first + tiles).
struct WinogradGradTask {
  WinogradTask images;     // x [N, H, W, C]
  const float* cotangent;  // [N, OH, OW, K]
  const float* zeros;      // [C]
  float* values;           // [tiles][C] of the images, a winograd_stride apart for each product
  float* cotangents;       // [tiles][K] of the cotangents, likewise
  float* products;         // as a WinogradTask's weight
  int64_t first, tiles;
};
// Tiles [begin, end) of those, to values and cotangents; their products, panels [begin, end) counted over all products,
// added to what is there unless these are the first tiles; kernels of products, the adjoint of a WinogradWeightKernel.
using WinogradGradKernel = void (*)(const WinogradGradTask&, int64_t begin, int64_t end);
using WinogradKernelsOf = void (*)(const WinogradWeightTask&, float* kernels, int64_t begin, int64_t end);

struct WinogradKernels {
  WinogradKernel convolution;
  WinogradWeightKernel weight;
  WinogradGradKernel grad_values;
  WinogradGradKernel grad_products;
  WinogradKernelsOf grad_kernels;
};

}  // namespace emr
