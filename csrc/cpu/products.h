// The interface between masked_gemm and its kernels, one set for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

// Columns of a wide panel, three vectors of float32 in AVX-512.
inline constexpr int64_t kWidePanel = 48;

// The product is made in tiles of a few rows by a panel of columns, whose part of the weight is packed once for many
// tiles. T is the tensors' dtype, A the compute type.
struct ProductKernels {
  int64_t rows;     // the most rows of a tile
  int64_t columns;  // columns of a panel
  // panel[h - begin][c] = weight[h][column + c] for units h in [begin, end), 0 beyond the weight's width; T to A.
  void (*pack)(const void* weight, int64_t width, int64_t column, int64_t begin, int64_t end, void* panel);
  // values[i][r] = grad[r][units[i]] * factors[i] (null: 1), for `rows` rows that are `stride` elements apart; T to A.
  void (*gather)(
      const void* grad, int64_t stride, int64_t rows, const int32_t* units, const void* factors, int64_t count,
      void* values);
  // tile[r][c] = start[r][c] + Σ_i values[i][r] * panel[units[i] - first][c], in the order of i; A. No start: 0.
  void (*multiply)(
      int64_t rows, const void* values, const int32_t* units, int64_t count, int64_t first, const void* panel,
      const void* start, void* tile);
  // tile += other; A.
  void (*add)(int64_t rows, const void* other, void* tile);
  // The first `count` columns to rows of T that are `stride` elements apart.
  void (*write)(const void* tile, int64_t rows, int64_t count, void* out, int64_t stride);
  // values[i][r] = tile[r][units[i] - first] * factors[i] (null: 1); A.
  void (*pick)(
      const void* tile, int64_t rows, const int32_t* units, const void* factors, int64_t count, int64_t first,
      void* values);
  // squares[r * stride] = Σ_c tile[r][c]²; A.
  void (*square)(const void* tile, int64_t rows, void* squares, int64_t stride);
  // The same as `pack` and `multiply` for a panel of kWidePanel columns, of which a tile computes those that `lanes`
  // names: see ChosenColumns. Null where the instruction set has no shuffle over two vectors of A.
  void (*pack_wide)(const void* weight, int64_t width, int64_t column, int64_t begin, int64_t end, void* panel);
  void (*multiply_chosen)(
      int64_t rows, const void* values, const int32_t* units, int64_t count, int64_t first, const void* panel,
      const int32_t* lanes, const void* start, void* tile);
};

}  // namespace emr
