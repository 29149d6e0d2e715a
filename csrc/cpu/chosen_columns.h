// Which columns of a wide panel a tile computes: those of the units that the next link sums over.
#pragma once

#include <algorithm>
#include <cstdint>

#include "active_units.h"
#include "products.h"

namespace emr::cpu {

// The chosen columns of one panel, dealt to the lanes of up to two tiles. A tile's first vector takes lanes from the
// panel's first two vectors, its second one from the last two: room for any kTile columns.
struct ChosenColumns {
  static constexpr int64_t kVector = kWidePanel / 3, kTile = 2 * kVector, kTiles = 2;

  int64_t place;                 // of the first one in the list of units
  int64_t count;                 // of all
  int32_t lanes[kTiles][kTile];  // of each tile: where each lane comes from, counted in its two vectors
  int32_t at[kWidePanel];        // of each chosen column: its lane, counted over both tiles
  int32_t column[kWidePanel];    // and its column in the panel

  // The units of [first, first + kWidePanel) that are in a list.
  template <class A>
  void choose(const Active<A>& list, int64_t first) {
    place = list.from(first);
    count = list.before(first + kWidePanel, place);
    deal(list.units + place, static_cast<int32_t>(first));
  }

  // Every column.
  void choose_all() {
    int32_t every[kWidePanel];
    for (int32_t c = 0; c < kWidePanel; ++c) {
      every[c] = c;
    }
    place = 0;
    count = kWidePanel;
    deal(every, 0);
  }

  int64_t tiles() const { return (count + kTile - 1) / kTile; }

 private:
  void deal(const int32_t* units, int32_t first) {
    std::fill_n(lanes[0], kTiles * kTile, 0);
    for (int64_t begin = 0; begin < count; begin += kTile) {
      const int64_t end = std::min(count, begin + kTile);
      int32_t* const lane = lanes[begin / kTile];
      int64_t low = 0, high = kTile;
      for (int64_t i = begin; i < end; ++i) {
        column[i] = units[i] - first;
        // Columns come in rising order: the first vectors fill up from the front, what is left of the middle follows
        // in the second vectors, and the last ones fill up from the back.
        const bool front = column[i] < kVector || (column[i] < 2 * kVector && low < kVector);
        const int64_t to = front ? low++ : --high;
        lane[to] = front ? column[i] : column[i] - static_cast<int32_t>(kVector);
        at[i] = static_cast<int32_t>(begin + to);
      }
    }
  }
};

}  // namespace emr::cpu
