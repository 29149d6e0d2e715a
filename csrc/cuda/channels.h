// How a vector of 16 bytes finds the channels of its elements, for tensors [N, C, ...] in either memory order.
//
//   rows:     `inner` consecutive elements share a channel, kShortRow or more, so that a vector meets two at most.
//   periodic: shorter rows, down to channels-last's single element. After every `period` vectors one starts at the
//             same element of a sample, so a thread keeps to one place in the period and looks up its channels once.
#pragma once

#include <algorithm>
#include <numeric>

#include "lanes.h"

namespace emr::cuda {

inline constexpr int64_t kShortRow = 32;
// Vectors that a thread has in flight.
inline constexpr int kUnroll = 2;
// What fills a large GPU twice.
inline constexpr int64_t kManyBlocks = 1024;

// Coefficients of a vector: the first `split` elements have one channel, the others the next.
struct TwoChannels {
  float scale0, scale1, shift0, shift1;
  int split;
  EMR_HOST_DEVICE float scale(int i) const { return i < split ? scale0 : scale1; }
  EMR_HOST_DEVICE float shift(int i) const { return i < split ? shift0 : shift1; }
};

// Coefficients of each element of a vector.
template <int lanes>
struct EachChannel {
  float scales[lanes], shifts[lanes];
  EMR_HOST_DEVICE float scale(int i) const { return scales[i]; }
  EMR_HOST_DEVICE float shift(int i) const { return shifts[i]; }
};

struct Rows {
  int64_t numel, inner;
  uint32_t channels;
  bool long_rows;  // too long for 32 bits: a block then meets one boundary at most
  Divider by_inner, by_channels;
  const float* scale;  // null: 1
  const float* shift;  // null: 0

  Rows() = default;
  Rows(int64_t numel, int64_t channels, int64_t inner, const float* scale, const float* shift)
      : numel(numel), inner(inner), channels(static_cast<uint32_t>(channels)), long_rows(inner > (int64_t{1} << 30)),
        by_inner(long_rows ? 1 : static_cast<uint32_t>(inner)), by_channels(static_cast<uint32_t>(channels)),
        scale(scale), shift(shift) {}
};

// Where a block of threads starts.
struct RowStart {
  int64_t offset;  // in its row
  uint32_t channel;
};

EMR_HOST_DEVICE inline RowStart row_start(const Rows& g, int64_t element) {
  const int64_t row = element / g.inner;
  return {element - row * g.inner, static_cast<uint32_t>(row % g.channels)};
}

// For the vector `ahead` elements (fewer than 2^30) after the start.
template <int lanes>
EMR_HOST_DEVICE inline TwoChannels channels_at(const Rows& g, const RowStart& start, int ahead) {
  const int64_t offset = start.offset + ahead;
  const uint32_t rows = g.long_rows ? offset >= g.inner : g.by_inner.divide(static_cast<uint32_t>(offset));
  const int64_t left = (rows + int64_t{1}) * g.inner - offset;
  uint32_t channel = start.channel + rows;
  channel -= g.by_channels.divide(channel) * g.channels;
  TwoChannels r;
  r.split = left < lanes ? static_cast<int>(left) : lanes;
  r.scale0 = r.scale1 = g.scale != nullptr ? g.scale[channel] : 1.0f;
  r.shift0 = r.shift1 = g.shift != nullptr ? g.shift[channel] : 0.0f;
  if (r.split < lanes) {
    channel = channel + 1 == g.channels ? 0 : channel + 1;
    r.scale1 = g.scale != nullptr ? g.scale[channel] : 1.0f;
    r.shift1 = g.shift != nullptr ? g.shift[channel] : 0.0f;
  }
  return r;
}

struct Periodic {
  int64_t numel, vectors;
  int64_t channels, inner;
  int64_t period;   // in vectors; whole bytes of bits, and whole samples
  int repeats;      // periods that a block covers side by side; 1 where a period takes several blocks
  bool in_vectors;  // a vector's channels are neighbours, and their coefficients can be loaded 16 bytes at a time
  const float* scale;
  const float* shift;

  Periodic() = default;
  Periodic(int lanes, int64_t numel, int64_t channels, int64_t inner, const float* scale, const float* shift)
      : numel(numel), vectors(divide_up(numel, lanes)), channels(channels), inner(inner),
        period(std::lcm(channels * inner, int64_t{8}) / lanes),
        repeats(static_cast<int>(std::max<int64_t>(1, kThreads / period))),
        in_vectors(inner == 1 && channels % lanes == 0 && is_aligned(scale) && is_aligned(shift)), scale(scale),
        shift(shift) {}

  // Vectors that a step of all blocks side by side covers: the places that threads have.
  EMR_HOST_DEVICE int64_t places() const { return period * repeats; }
  int64_t blocks_across() const { return divide_up(places(), kThreads); }
  int64_t steps() const { return divide_up(vectors, places()); }
  // Whole warps.
  int threads() const { return static_cast<int>(std::min<int64_t>(kThreads, divide_up(places(), 32) * 32)); }
  // Blocks that share the steps, so that each thread takes `least` vectors or more where there are as many.
  int64_t blocks_along(int64_t least, int64_t most) const {
    return std::clamp<int64_t>(divide_up(steps(), least), 1, std::max<int64_t>(1, most));
  }
};

template <int lanes>
EMR_HOST_DEVICE inline EachChannel<lanes> channels_at(const Periodic& g, int64_t place) {
  EachChannel<lanes> r;
  int64_t in_sample = place * lanes % (g.channels * g.inner);
  if (g.in_vectors) {
    for (int i = 0; i < lanes; i += 4) {
      const Packed<float> one{{1.0f, 1.0f, 1.0f, 1.0f}}, zero{};
      const Packed<float> s = g.scale != nullptr ? load_packed(g.scale + in_sample + i) : one;
      const Packed<float> b = g.shift != nullptr ? load_packed(g.shift + in_sample + i) : zero;
      for (int k = 0; k < 4; ++k) {
        r.scales[i + k] = s.v[k];
        r.shifts[i + k] = b.v[k];
      }
    }
    return r;
  }
  int64_t channel = in_sample / g.inner;
  in_sample -= channel * g.inner;
  for (int i = 0; i < lanes; ++i) {
    r.scales[i] = g.scale != nullptr ? g.scale[channel] : 1.0f;
    r.shifts[i] = g.shift != nullptr ? g.shift[channel] : 0.0f;
    if (++in_sample == g.inner) {
      in_sample = 0;
      channel = channel + 1 == g.channels ? 0 : channel + 1;
    }
  }
  return r;
}

}  // namespace emr::cuda
