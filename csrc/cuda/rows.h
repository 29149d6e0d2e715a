// Rows of logits, each shared by a team of threads: what logit_seeds and robust_losses do with a row, for one member of
// its team. Host and device: a test runs teams of threads on the CPU.
//
// A team has rank() and size(), and sum(float) and max(int64_t) over its members, which all get the result.
#pragma once

#include "../row_formulas.h"
#include "lanes.h"

namespace emr::cuda {

// Whole numbers that order logits: by value, NaN above everything, then the first class first.
inline constexpr int64_t kNothing = INT64_MIN;

EMR_HOST_DEVICE inline int64_t order_of(float z, int k) {
  const auto bits = bits_as<int32_t>(z == 0 ? 0.0f : z);
  const int32_t key = z != z ? 0x7fffffff : bits < 0 ? bits ^ 0x7fffffff : bits;
  return static_cast<int64_t>(key) * (int64_t{1} << 32) + (0x7fffffff - k);
}
EMR_HOST_DEVICE inline float value_of(int64_t order) {
  const auto key = static_cast<int32_t>(order >> 32);
  return bits_as<float>(key < 0 ? key ^ 0x7fffffff : key);
}
EMR_HOST_DEVICE inline int place_of(int64_t order) { return 0x7fffffff - static_cast<int>(order & 0x7fffffff); }

EMR_HOST_DEVICE inline float not_a_number() { return bits_as<float>(0x7fc00000); }

// Elements of a row that a thread keeps in registers: few, many, or none, where a block reads its row again and again.
// The teams of the first two are lanes of one warp.
inline constexpr int kFewHeld = 8, kManyHeld = 32, kMostLanes = 32;

inline int held_for(int64_t classes) {
  return classes <= kFewHeld * kMostLanes ? kFewHeld : classes <= kManyHeld * kMostLanes ? kManyHeld : 0;
}

// Lanes that share a row of which each holds so many elements at most.
inline int team_width(int64_t classes, int held) {
  int width = 1;
  while (width * held < classes) {
    width *= 2;
  }
  return width;
}

// `count` rows of one length side by side. A member has every size()-th vector of kLanes classes, the first ones after
// its rank; `held` elements of each row at most, which stay in registers, or any number of them, read again at each use,
// where `held` is 0.
template <class T, int count, int held>
struct RowsOf {
  static constexpr int kWidth = kLanes<T>;
  const T* rows[count];
  int classes, rank, size;
  bool aligned;  // each row, to 16 bytes
  Lanes<T> vectors[held > 0 ? held / kWidth : 1][count];

  // Reads what is held.
  template <class Team>
  EMR_HOST_DEVICE RowsOf(const Team& team, const T* const (&from)[count], int classes, bool aligned)
      : classes(classes), rank(team.rank()), size(team.size()), aligned(aligned) {
    EMR_UNROLL for (int r = 0; r < count; ++r) {
      rows[r] = from[r];
    }
    if constexpr (held > 0) {
      EMR_UNROLL for (int i = 0; i < held / kWidth; ++i) {
        read((i * size + rank) * kWidth, vectors[i]);
      }
    }
  }

  EMR_HOST_DEVICE void read(int first, Lanes<T> (&to)[count]) const {
    EMR_UNROLL for (int r = 0; r < count; ++r) {
      to[r] = aligned && first + kWidth <= classes ? load_lanes<T, true>(rows[r] + first)
                                                   : load_some(rows[r] + first, classes - first);
    }
  }

  // Calls f(first class, vectors) for each of the member's vectors.
  template <class F>
  EMR_HOST_DEVICE void each_vector(const F& f) const {
    if constexpr (held > 0) {
      EMR_UNROLL for (int i = 0; i < held / kWidth; ++i) {
        f((i * size + rank) * kWidth, vectors[i]);
      }
    } else {
      Lanes<T> now[count];
      for (int first = rank * kWidth; first < classes; first += size * kWidth) {
        read(first, now);
        f(first, now);
      }
    }
  }

  // Calls f(class, logits) for each of the member's classes.
  template <class F>
  EMR_HOST_DEVICE void each(const F& f) const {
    each_vector([&](int first, const Lanes<T> (&now)[count]) {
      EMR_UNROLL for (int j = 0; j < kWidth; ++j) {
        if (first + j < classes) {
          float z[count];
          EMR_UNROLL for (int r = 0; r < count; ++r) {
            z[r] = now[r].v[j];
          }
          f(first + j, z);
        }
      }
    });
  }

  // Fills rows of results, each aligned where the logits are: f(class, logits, results).
  template <class U, class F>
  EMR_HOST_DEVICE void put(U* const (&to)[count], const F& f) const {
    each_vector([&](int first, const Lanes<T> (&now)[count]) {
      Lanes<T> results[count] = {};
      EMR_UNROLL for (int j = 0; j < kWidth; ++j) {
        if (first + j < classes) {
          float z[count], result[count];
          EMR_UNROLL for (int r = 0; r < count; ++r) {
            z[r] = now[r].v[j];
          }
          f(first + j, z, result);
          EMR_UNROLL for (int r = 0; r < count; ++r) {
            results[r].v[j] = result[r];
          }
        }
      }
      EMR_UNROLL for (int r = 0; r < count; ++r) {
        EMR_UNROLL for (int j = 0; j < kWidth; j += kLanes<U>) {
          Lanes<U> part;
          EMR_UNROLL for (int i = 0; i < kLanes<U>; ++i) {
            part.v[i] = results[r].v[j + i];
          }
          if (aligned && first + j + kLanes<U> <= classes) {
            store_lanes<U, true>(to[r] + first + j, part);
          } else {
            store_some(to[r] + first + j, part, classes - first - j);
          }
        }
      }
    });
  }
};

// The orders of the largest of row `r`, falling, known to the whole team.
template <int r, int ranks, class Team, class Rows>
EMR_HOST_DEVICE inline void rank_row(const Team& team, const Rows& rows, int64_t (&best)[ranks]) {
  int64_t own[ranks];
  EMR_UNROLL for (int j = 0; j < ranks; ++j) {
    own[j] = kNothing;
  }
  rows.each([&](int k, const auto& z) {
    int64_t order = order_of(z[r], k);
    EMR_UNROLL for (int j = 0; j < ranks; ++j) {
      const int64_t lesser = order < own[j] ? order : own[j];
      own[j] = order < own[j] ? own[j] : order;
      order = lesser;
    }
  });
  EMR_UNROLL for (int j = 0; j < ranks; ++j) {
    best[j] = team.max(own[0]);
    if (own[0] == best[j]) {
      EMR_UNROLL for (int i = 0; i + 1 < ranks; ++i) {
        own[i] = own[i + 1];
      }
      own[ranks - 1] = kNothing;
    }
  }
}

// A class index, or -1 for one that is out of range.
EMR_HOST_DEVICE inline int class_of(int64_t index, int classes) {
  return index >= 0 && index < classes ? static_cast<int>(index) : -1;
}

// A row's logit at a place; NaN where no class is.
template <class T>
EMR_HOST_DEVICE inline float logit_at(const T* row, int place) {
  return place >= 0 ? to_float(row[place]) : not_a_number();
}

}  // namespace emr::cuda
