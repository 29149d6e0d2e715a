// to_hyperplane on the CPU.
#include <algorithm>
#include <cmath>
#include <string>

#include "layout.h"

namespace emr::cpu {
namespace {

// One row in scratch memory, padded with zeros to whole units: a pixel's |w|, how far it may move, how far it does.
template <class A>
struct Row {
  A *slope, *room, *moved;
  int64_t size;
};

// The sum of f over a row, one partial sum in each lane of a unit.
template <class A, class F>
A total(int64_t size, const F& f) {
  A lanes[kUnit] = {};
  for (int64_t i = 0; i < size; i += kUnit) {
    for (int64_t j = 0; j < kUnit; ++j) {
      lanes[j] += f(i + j);
    }
  }
  A sum = 0;
  for (const A lane : lanes) {
    sum += lane;
  }
  return sum;
}

// The least t whose moves min(t * rate, room) cover `needed`, by Newton's steps from 0; rate: |w| for L2, else 1.
template <class A, bool kL2>
void advance(const Row<A>& row, A needed) {
  A t = 0;
  for (int64_t step = 0; step <= row.size; ++step) {
    const A steepness = total<A>(row.size, [&](int64_t i) {
      const A s = row.slope[i];
      return row.moved[i] < row.room[i] ? (kL2 ? s * s : s) : A(0);
    });
    const A missing = needed - total<A>(row.size, [&](int64_t i) { return row.slope[i] * row.moved[i]; });
    const A next = steepness > 0 && missing > 0 ? t + missing / steepness : t;
    if (!(next > t)) {
      break;
    }
    t = next;
    for (int64_t i = 0; i < row.size; i += kUnit) {
      for (int64_t j = i; j < i + kUnit; ++j) {
        const A move = kL2 ? t * row.slope[j] : t;
        row.moved[j] = move < row.room[j] ? move : row.room[j];
      }
    }
  }
}

template <class A>
A sign(A v) {
  return static_cast<A>((v > 0) - (v < 0));
}

template <class T, bool kL2>
void rows(const Tensor& x, const Tensor& w, const Tensor& gap, const Tensor& d, const Tensor& length) {
  using A = compute_t<T>;
  const int64_t size = x.size(1), padded = (size + kUnit - 1) / kUnit * kUnit;
  const auto* const points = static_cast<const T*>(x.const_data_ptr());
  const auto* const normals = static_cast<const T*>(w.const_data_ptr());
  const auto* const gaps = static_cast<const T*>(gap.const_data_ptr());
  auto* const out = static_cast<T*>(d.mutable_data_ptr());
  auto* const lengths = static_cast<T*>(length.mutable_data_ptr());
  const int64_t grain = 1 + kBlock / (16 * padded + 1);
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(3 * padded);
    const Row<A> row{scratch.get(), scratch.get() + padded, scratch.get() + 2 * padded, padded};
    std::fill_n(scratch.get(), 3 * padded, A(0));
    for (int64_t n = begin; n < end; ++n) {
      const T* const from = points + n * size;
      const T* const normal = normals + n * size;
      const A g = widened(gaps[n]), toward = -sign(g), needed = std::abs(g);
      for (int64_t i = 0; i < size; ++i) {
        const A weight = widened(normal[i]), at = widened(from[i]);
        const A room = toward * weight > 0 ? 1 - at : at;
        row.slope[i] = std::abs(weight);
        row.room[i] = weight == 0 || room < 0 ? A(0) : room;
        row.moved[i] = 0;
      }
      advance<A, kL2>(row, needed);
      const A reach = total<A>(padded, [&](int64_t i) { return row.slope[i] * row.room[i]; });
      const A* const moves = reach > needed ? row.moved : row.room;
      A longest = 0, squares = 0;
      for (int64_t i = 0; i < size; ++i) {
        const A move = toward * sign(widened(normal[i])) * moves[i];
        out[n * size + i] = narrowed<T>(move);
        longest = std::max(longest, std::abs(move));
        squares += move * move;
      }
      lengths[n] = narrowed<T>(kL2 ? std::sqrt(squares) : longest);
    }
  });
}

template <class T>
void rows_of(
    const std::string& norm, const Tensor& x, const Tensor& w, const Tensor& gap, const Tensor& d,
    const Tensor& length) {
  norm == "l2" ? rows<T, true>(x, w, gap, d, length) : rows<T, false>(x, w, gap, d, length);
}

}  // namespace

std::tuple<Tensor, Tensor> to_hyperplane(const Tensor& x, const Tensor& w, const Tensor& gap, std::string norm) {
  STD_TORCH_CHECK(norm == "linf" || norm == "l2", "norm is '", norm, "'; expected 'linf' or 'l2'");
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_contiguous() && w.is_contiguous() && gap.is_contiguous() && gap.dim() == 1 &&
          w.dim() == 2 && w.size(0) == x.size(0) && w.size(1) == x.size(1) && gap.size(0) == x.size(0) &&
          w.scalar_type() == x.scalar_type() && gap.scalar_type() == x.scalar_type(),
      "expected contiguous x and w [M, D] and gap [M] of one dtype");
  Tensor d = torch::stable::empty_like(x);
  Tensor length = torch::stable::empty_like(gap);
  switch (dtype_of(x)) {
    case Dtype::f32:
      rows_of<float>(norm, x, w, gap, d, length);
      break;
    case Dtype::f64:
      rows_of<double>(norm, x, w, gap, d, length);
      break;
    case Dtype::bf16:
      rows_of<bf16>(norm, x, w, gap, d, length);
      break;
    case Dtype::fp16:
      rows_of<fp16>(norm, x, w, gap, d, length);
      break;
  }
  return {d, length};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("to_hyperplane", TORCH_BOX(&emr::cpu::to_hyperplane));
}
