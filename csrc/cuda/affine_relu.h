// The bodies of affine_relu's kernels for one thread. Host and device: a test runs all threads on the CPU.
//
// Each element is read and written by one thread, and everything that a thread has in flight is read before it writes:
// results may lie where arguments do.
#pragma once

#include "channels.h"

namespace emr::cuda {

template <class T>
struct Forward {
  const T* a;
  const T* skip;
  T* y;
  uint8_t* bits;
  int64_t numel;
  float slope;
  bool aligned;  // all of these tensors, to 16 bytes
};

// What a second tensor does in the transposed pass: nothing, is added to out, or makes sums of its products.
enum class Second { none, skip, delta };

template <class T>
struct Backward {
  const T* in;
  const T* second;
  T* out;
  const uint8_t* bits;
  int64_t numel;
  float slope;
  bool aligned;  // all of these tensors, to 16 bytes
};

// Bits of one vector to their byte. Half a byte, for float32: the thread with the even vector writes that of the next.
template <class T>
EMR_HOST_DEVICE inline void store_bits(uint8_t* bits, int64_t vector, int64_t numel, uint32_t own, uint32_t next) {
  constexpr int lanes = kLanes<T>;
  if (vector * lanes < numel && (lanes == 8 || vector % 2 == 0)) {
    bits[vector * lanes / 8] = static_cast<uint8_t>(lanes == 8 ? own : own | next << 4);
  }
}

template <class T>
EMR_HOST_DEVICE inline uint32_t load_bits(const uint8_t* bits, int64_t vector) {
  const int64_t element = vector * kLanes<T>;
  return bits[element >> 3] >> (element & 7);
}

// Elements of a vector: none from `end` on.
template <class T>
EMR_HOST_DEVICE inline int elements_of(int64_t vector, int64_t end, int64_t numel) {
  const int64_t left = numel - vector * kLanes<T>;
  return vector >= end ? 0 : left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
}

// y of one vector, and its bits.
template <class T, bool has_skip, class Coefs>
EMR_HOST_DEVICE inline Packed<T> forward_vector(
    const Packed<T>& a, const Packed<T>& skip, const Coefs& c, float slope, uint32_t& bits) {
  Packed<T> y;
  bits = 0;
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    float t = to_float(a.v[i]) * c.scale(i) + c.shift(i);
    if constexpr (has_skip) {
      t += to_float(skip.v[i]);
    }
    bits |= static_cast<uint32_t>(t > 0) << i;
    round_to(y.v[i], leaky_relu(t, slope));
  }
  return y;
}

// kUnroll vectors from `first` on, `stride` apart, those before `end`; returns their bits, in a byte for each. `whole`:
// all of them are before `end`, complete and aligned. `coefs` are those of each vector, or one for all.
template <class T, bool has_skip, class Coefs, int n>
EMR_HOST_DEVICE inline uint32_t forward_vectors(
    const Forward<T>& f, int64_t first, int64_t stride, int64_t end, bool whole, const Coefs (&coefs)[n]) {
  constexpr int lanes = kLanes<T>;
  uint32_t all = 0, bits;
  if (whole) {
    Packed<T> a[kUnroll], skip[kUnroll];
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      a[u] = load_packed(f.a + (first + u * stride) * lanes);
      if constexpr (has_skip) {
        skip[u] = load_packed(f.skip + (first + u * stride) * lanes);
      }
    }
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const Packed<T> y = forward_vector<T, has_skip>(a[u], skip[u], coefs[n == 1 ? 0 : u], f.slope, bits);
      store_packed(f.y + (first + u * stride) * lanes, y);
      all |= bits << (8 * u);
    }
    return all;
  }
  EMR_UNROLL_TIMES(n) for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * stride;
    const int count = elements_of<T>(vector, end, f.numel);
    const Packed<T> a = load_packed(f.a + vector * lanes, count);
    const Packed<T> skip = has_skip ? load_packed(f.skip + vector * lanes, count) : Packed<T>{};
    const Packed<T> y = forward_vector<T, has_skip>(a, skip, coefs[n == 1 ? 0 : u], f.slope, bits);
    store_packed(f.y + vector * lanes, y, count);
    all |= (bits & ((1u << count) - 1)) << (8 * u);
  }
  return all;
}

// out of one vector; with a delta also the products of in * slope(bits) and delta.
template <class T, Second role, class Coefs>
EMR_HOST_DEVICE inline Packed<T> backward_vector(
    const Packed<T>& in, const Packed<T>& second, uint32_t bits, const Coefs& c, float slope, Lanes<T>& products) {
  Packed<T> out;
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    const float x = masked(to_float(in.v[i]), bits >> i & 1, slope);
    float y = x * c.scale(i);
    if constexpr (role == Second::delta) {
      products.v[i] = x * to_float(second.v[i]);
    } else if constexpr (role == Second::skip) {
      y += to_float(second.v[i]);
    }
    round_to(out.v[i], y);
  }
  return out;
}

// As forward_vectors; calls add(coefs, products) for each vector: with a delta, products of 0 beyond its elements.
template <class T, Second role, class Coefs, int n, class Add>
EMR_HOST_DEVICE inline void backward_vectors(
    const Backward<T>& f, int64_t first, int64_t stride, int64_t end, bool whole, const Coefs (&coefs)[n],
    const Add& add) {
  constexpr int lanes = kLanes<T>;
  Lanes<T> products;
  if (whole) {
    Packed<T> in[kUnroll], second[kUnroll];
    uint32_t bits[kUnroll];
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * stride;
      in[u] = load_packed(f.in + vector * lanes);
      if constexpr (role != Second::none) {
        second[u] = load_packed(f.second + vector * lanes);
      }
      bits[u] = load_bits<T>(f.bits, vector);
    }
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const Coefs& c = coefs[n == 1 ? 0 : u];
      const Packed<T> out = backward_vector<T, role>(in[u], second[u], bits[u], c, f.slope, products);
      store_packed(f.out + (first + u * stride) * lanes, out);
      add(c, products);
    }
    return;
  }
  EMR_UNROLL_TIMES(n) for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * stride;
    const int count = elements_of<T>(vector, end, f.numel);
    const Packed<T> in = load_packed(f.in + vector * lanes, count);
    const Packed<T> second = role != Second::none ? load_packed(f.second + vector * lanes, count) : Packed<T>{};
    const uint32_t bits = count > 0 ? load_bits<T>(f.bits, vector) : 0;
    const Coefs& c = coefs[n == 1 ? 0 : u];
    const Packed<T> out = backward_vector<T, role>(in, second, bits, c, f.slope, products);
    store_packed(f.out + vector * lanes, out, count);
    add(c, products);
  }
}

struct AddNothing {
  template <class Coefs, class Products>
  EMR_HOST_DEVICE void operator()(const Coefs&, const Products&) const {}
};

// Vectors of a block that works through rows.
inline constexpr int kBlockVectors = kThreads * kUnroll;

template <class T, bool has_skip>
EMR_HOST_DEVICE inline uint32_t forward_rows_thread(const Forward<T>& f, const Rows& g, int64_t block, int thread) {
  const int64_t first = block * kBlockVectors;
  const RowStart start = row_start(g, first * kLanes<T>);
  TwoChannels coefs[kUnroll];
  EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
    coefs[u] = channels_at<kLanes<T>>(g, start, (u * kThreads + thread) * kLanes<T>);
  }
  const bool whole = f.aligned && (first + kBlockVectors) * kLanes<T> <= f.numel;
  const int64_t end = (f.numel + kLanes<T> - 1) / kLanes<T>;
  return forward_vectors<T, has_skip>(f, first + thread, kThreads, end, whole, coefs);
}

template <class T, Second role>
EMR_HOST_DEVICE inline void backward_rows_thread(const Backward<T>& f, const Rows& g, int64_t block, int thread) {
  const int64_t first = block * kBlockVectors;
  const RowStart start = row_start(g, first * kLanes<T>);
  TwoChannels coefs[kUnroll];
  EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
    coefs[u] = channels_at<kLanes<T>>(g, start, (u * kThreads + thread) * kLanes<T>);
  }
  const bool whole = f.aligned && (first + kBlockVectors) * kLanes<T> <= f.numel;
  const int64_t end = (f.numel + kLanes<T> - 1) / kLanes<T>;
  backward_vectors<T, role>(f, first + thread, kThreads, end, whole, coefs, AddNothing{});
}

// Blocks side by side in a period, and blocks that share its steps.
struct PeriodicGrid {
  int64_t across, along;

  // Several vectors a thread where there is work for a whole GPU, so that looking up the channels is shared.
  static PeriodicGrid plain(const Periodic& g) {
    const int64_t least = std::clamp<int64_t>(g.vectors / (kManyBlocks * kThreads), kUnroll, 4 * kUnroll);
    return {g.blocks_across(), g.blocks_along(least, kMostAlong)};
  }
  // Sums: few enough blocks that their tables stay small beside the tensors.
  static PeriodicGrid summing(const Periodic& g) {
    const int64_t least = g.blocks_across() == 1 ? kUnroll : 4 * kUnroll;
    return {g.blocks_across(), g.blocks_along(least, kManyBlocks / g.blocks_across())};
  }

 private:
  static constexpr int64_t kMostAlong = 65535;
};

// Steps `step` and `step + along` of the thread at one place of the period.
template <class T, bool has_skip, class Coefs>
EMR_HOST_DEVICE inline uint32_t forward_periodic_thread(
    const Forward<T>& f, const Periodic& g, const Coefs (&coefs)[1], int64_t place, int64_t step, int64_t along) {
  const int64_t places = g.places(), first = step * places + place, stride = along * places;
  const bool whole = f.aligned && (first + (kUnroll - 1) * stride + 1) * kLanes<T> <= f.numel;
  return forward_vectors<T, has_skip>(f, first, stride, g.vectors, whole, coefs);
}

// As above; `add` as in backward_vectors.
template <class T, Second role, class Coefs, class Add>
EMR_HOST_DEVICE inline void backward_periodic_thread(
    const Backward<T>& f, const Periodic& g, const Coefs (&coefs)[1], int64_t place, int64_t step, int64_t along,
    const Add& add) {
  const int64_t places = g.places(), first = step * places + place, stride = along * places;
  const bool whole = f.aligned && (first + (kUnroll - 1) * stride + 1) * kLanes<T> <= f.numel;
  backward_vectors<T, role>(f, first, stride, g.vectors, whole, coefs, add);
}

// A block's totals, one for each element of its places: what part number `part` of `parts` adds up for a channel.
EMR_HOST_DEVICE inline float channel_part(
    const float* totals, int lanes, const Periodic& g, int64_t channel, int part, int parts) {
  const int inner = static_cast<int>(g.inner), sample = static_cast<int>(g.channels) * inner;
  const int terms = static_cast<int>(g.places()) * lanes / sample * inner;
  float sum = 0;
  for (int k = part; k < terms; k += parts) {
    const int repeat = k / inner;
    sum += totals[repeat * sample + static_cast<int>(channel) * inner + (k - repeat * inner)];
  }
  return sum;
}

// How rows are summed: each row in pieces of `length` vectors, each piece by `lanes` neighbouring threads. A vector
// belongs to the row in which it starts; what it holds of the next row is summed apart, as that row's head.
//
// The sums of row r are table[r * columns() ...]: one for each piece, then, if there are `heads`, its head.
struct Pieces {
  int64_t rows, pieces, length;
  int lanes;
  bool heads;

  Pieces() = default;
  Pieces(int vector_lanes, int64_t numel, int64_t inner) : rows(numel / inner) {
    constexpr int64_t kLongest = 512, kMost = 8192;
    const int64_t vectors = divide_up(inner, vector_lanes);
    pieces = divide_up(vectors, std::max(kLongest, divide_up(vectors, kMost)));
    length = divide_up(vectors, pieces);
    // Eight vectors a thread hide the cost of adding the threads' sums up.
    lanes = 4;
    while (lanes < 32 && lanes * 8 < length) {
      lanes *= 2;
    }
    heads = inner % vector_lanes != 0;
  }
  EMR_HOST_DEVICE int64_t columns() const { return pieces + heads; }
  EMR_HOST_DEVICE int64_t units() const { return rows * pieces; }
};

struct RowSums {
  float own, next;
};

// One thread's part of piece number `unit`: thread `lane` of the piece's.
template <class T>
EMR_HOST_DEVICE inline RowSums backward_piece_thread(
    const Backward<T>& f, const Rows& g, const Pieces& p, int64_t unit, int lane) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = unit / p.pieces, piece = unit - row * p.pieces;
  const int64_t row_end = (row + 1) * g.inner;
  const int64_t begin = (row * g.inner + lanes - 1) / lanes + piece * p.length;
  const int64_t row_vectors = (row_end + lanes - 1) / lanes;
  const int64_t end = begin + p.length < row_vectors ? begin + p.length : row_vectors;
  const uint32_t channel = static_cast<uint32_t>(row % g.channels);
  const uint32_t after = channel + 1 == g.channels ? 0 : channel + 1;
  TwoChannels coefs[kUnroll];
  EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
    coefs[u].scale0 = g.scale != nullptr ? g.scale[channel] : 1.0f;
    coefs[u].scale1 = g.scale != nullptr ? g.scale[after] : 1.0f;
  }
  RowSums sums{0, 0};
  for (int64_t first = begin + lane; first < end; first += kUnroll * p.lanes) {
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int64_t left = row_end - (first + u * p.lanes) * lanes;
      coefs[u].split = left < lanes ? static_cast<int>(left) : lanes;
    }
    const int64_t last = first + (kUnroll - 1) * p.lanes;
    const bool whole = f.aligned && last < end && (last + 1) * lanes <= f.numel;
    const auto add = [&sums](const TwoChannels& c, const Lanes<T>& products) {
      float own = 0, next = 0;
      EMR_UNROLL for (int i = 0; i < lanes; ++i) {
        own += i < c.split ? products.v[i] : 0.0f;
        next += i < c.split ? 0.0f : products.v[i];
      }
      sums.own += own;
      sums.next += next;
    };
    backward_vectors<T, Second::delta>(f, first, p.lanes, end, whole, coefs, add);
  }
  return sums;
}

// The sums of all the piece's threads, by one of them.
template <class T>
EMR_HOST_DEVICE inline void store_piece(
    float* table, const Rows& g, const Pieces& p, int64_t unit, const RowSums& sums) {
  constexpr int lanes = kLanes<T>;
  const int64_t row = unit / p.pieces, piece = unit - row * p.pieces;
  table[row * p.columns() + piece] = sums.own;
  if (!p.heads) {
    return;
  }
  if (unit == 0) {
    table[p.pieces] = 0;
  }
  const int64_t begin = (row * g.inner + lanes - 1) / lanes, end = ((row + 1) * g.inner + lanes - 1) / lanes;
  if (row + 1 < p.rows && (end - begin - 1) / p.length == piece) {
    table[(row + 1) * p.columns() + p.pieces] = sums.next;
  }
}

// A table of sums [outer, channels, inner], to be added up over outer and inner.
struct Table {
  const float* sums;
  int64_t channels, inner;
  uint32_t terms;  // outer * inner
  Divider by_inner;

  Table() = default;
  Table(const float* sums, int64_t outer, int64_t channels, int64_t inner)
      : sums(sums), channels(channels), inner(inner), terms(static_cast<uint32_t>(outer * inner)),
        by_inner(static_cast<uint32_t>(inner)) {}
};

EMR_HOST_DEVICE inline double table_part(const Table& t, int64_t channel, uint32_t part, uint32_t parts) {
  double sum = 0;
  EMR_UNROLL_TIMES(4) for (uint32_t k = part; k < t.terms; k += parts) {
    const uint32_t outer = t.by_inner.divide(k);
    sum += t.sums[(outer * t.channels + channel) * t.inner + (k - outer * static_cast<uint32_t>(t.inner))];
  }
  return sum;
}

}  // namespace emr::cuda
