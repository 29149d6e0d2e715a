// Cotangents carried back through a chain of (leaky) ReLUs and linear layers, some samples at a time.
//
// Units that are off cost nothing: the rows of a sample share its bits, so a tile of them sums over the sample's list
// of units that are on, and of a product only the columns that the next list asks for are computed (with AVX-512) or
// kept. Where all samples share one grad (the rows of a classifier's last weight), their first products differ by few
// units: they start from the product over the units that are on in most samples.
#pragma once

#include <cmath>

#include "active_units.h"
#include "chosen_columns.h"
#include "layout.h"
#include "products.h"

namespace emr::cpu {

// A linear layer and the ReLU after it.
struct Link {
  const uint8_t* bits;
  const char* weight;  // T [units, columns]
  int64_t units, columns;
  double slope;
};

struct ChainTask {
  const char* grad;  // T [samples, rows, units of the first link]
  int64_t stride;    // elements from sample to sample; 0: they share one grad
  int64_t samples, rows;
  int64_t element;  // bytes of a T
  std::vector<Link> links;
  char* out;      // T [samples, rows, columns of the last link]; null: squares are asked for
  void* squares;  // A [samples, rows]
};

template <class A>
class Chain {
 public:
  Chain(const ChainTask& task, const ProductKernels& kernels)
      : t(task),
        k(kernels),
        widest(widest_of(task)),
        // The values of so many samples stay near the processor, and so much of a panel in its second cache.
        most(std::clamp<int64_t>((5 << 19) / (t.rows * widest * int64_t{sizeof(A)}), 1, t.samples)),
        block(std::max<int64_t>(1, (192 << 10) / (k.columns * int64_t{sizeof(A)}))),
        values{Scratch<A>((most + 1) * t.rows * widest), Scratch<A>(t.links.size() > 1 ? most * t.rows * widest : 0)},
        partial(t.out == nullptr ? most * t.rows * panels(t.links.back()) : 0) {
    for (const Link& link : t.links) {
      active.emplace_back(most, link.units, link.slope);
    }
    shares = t.stride == 0 && t.samples > 1 && grad_is_finite();
  }

  void run() {
    for (int64_t first = 0; first < t.samples; first += most) {
      const int64_t count = std::min(most, t.samples - first);
      for (size_t l = 0; l < t.links.size(); ++l) {
        active[l].choose(t.links[l].bits, first, count, shares && l == 0);
      }
      cut(count);
      gather(first);
      for (size_t l = 0; l < t.links.size(); ++l) {
        multiply(l, first);
      }
      if (t.out == nullptr) {
        add_squares(first, count);
      }
    }
  }

 private:
  // Some rows of one sample at hand. The base comes after the samples.
  struct Piece {
    int64_t sample, row, rows;
  };

  static int64_t widest_of(const ChainTask& task) {
    int64_t widest = 1;
    for (const Link& link : task.links) {
      widest = std::max(widest, link.units);
    }
    return widest;
  }

  int64_t panels(const Link& link) const { return (link.columns + k.columns - 1) / k.columns; }

  // Where a piece's values before a link are: A [active units, rows].
  A* values_of(size_t l, const Piece& piece) const {
    return values[l % 2].get() + (piece.sample * t.rows + piece.row) * t.links[l].units;
  }

  // Infinite values cannot be taken back from a base.
  bool grad_is_finite() {
    std::vector<int32_t> every(t.links[0].units);
    for (size_t h = 0; h < every.size(); ++h) {
      every[h] = static_cast<int32_t>(h);
    }
    A* const all = values[0].get();
    const auto units = static_cast<int64_t>(every.size());
    k.gather(t.grad, units, t.rows, every.data(), nullptr, units, all);
    return std::all_of(all, all + t.rows * units, [](A value) { return std::isfinite(value); });
  }

  void cut(int64_t count) {
    const int64_t tiles = (t.rows + k.rows - 1) / k.rows, rows = (t.rows + tiles - 1) / tiles;
    const bool based = active[0].has_base();
    pieces.clear();
    for (int64_t n = 0; n < count + (based ? 1 : 0); ++n) {
      for (int64_t row = 0; row < t.rows; row += rows) {
        pieces.push_back({n, row, std::min(rows, t.rows - row)});
      }
    }
    const auto total = static_cast<int64_t>(pieces.size());
    bases = based ? total / (count + 1) : 0;
    owned = total - bases;
  }

  void gather(int64_t first) {
    const int64_t units = t.links[0].units;
    torch::stable::parallel_for(0, owned + bases, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece& piece = pieces[i];
        const Active<A>& a = active[0][piece.sample];
        const char* const grad = t.grad + ((first + piece.sample) * t.stride + piece.row * units) * t.element;
        k.gather(grad, units, piece.rows, a.units, a.factors, a.count, values_of(0, piece));
      }
    });
  }

  // A task is one panel and a group of pieces; consecutive tasks share the panel.
  void multiply(size_t l, int64_t first) {
    narrows(l) ? share<NarrowWorker>(l, first, kWidePanel) : share<Worker>(l, first, k.columns);
  }

  // Whether the next link's units that are off save columns.
  bool narrows(size_t l) const {
    return k.multiply_chosen != nullptr && l + 1 < t.links.size() && t.links[l + 1].slope == 0;
  }

  template <class W>
  void share(size_t l, int64_t first, int64_t columns) {
    constexpr int64_t kMostPieces = 256, kTasksByThread = 4;
    const int64_t count = (t.links[l].columns + columns - 1) / columns, threads = torch::stable::get_num_threads();
    const int64_t least = (owned + kMostPieces - 1) / kMostPieces;
    const int64_t groups = std::clamp<int64_t>((kTasksByThread * threads + count - 1) / count, least, owned);
    const int64_t size = (owned + groups - 1) / groups;
    torch::stable::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
      W worker(*this, l, first, size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t piece = std::min(i % groups * size, owned);
        worker.run(i / groups, piece, std::min(piece + size, owned));
      }
    });
  }

  // One thread's packed panel and tiles.
  class Worker {
   public:
    Worker(const Chain& chain, size_t l, int64_t first, int64_t pieces)
        : c(chain),
          k(chain.k),
          link(chain.t.links[l]),
          l(l),
          first(first),
          bases(l == 0 ? chain.bases : 0),
          tile(k.rows * k.columns),
          panel(std::min(c.block, link.units) * k.columns),
          tiles(pieces * tile),
          base_tiles(bases * tile) {}

    void run(int64_t p, int64_t begin, int64_t end) {
      const Piece* const base = c.pieces.data() + c.owned;
      const bool new_base = p != base_panel;
      for (int64_t from = 0; from < link.units; from += c.block) {
        const int64_t to = std::min(from + c.block, link.units);
        if (packed_panel != p || packed_from != from) {
          k.pack(link.weight, link.columns, p * k.columns, from, to, panel.get());
          packed_panel = p, packed_from = from;
        }
        for (int64_t i = 0; new_base && i < bases; ++i) {
          multiply(base[i], from, to, base_tiles.get() + i * tile);
        }
        for (int64_t i = begin; i < end; ++i) {
          multiply(c.pieces[i], from, to, tiles.get() + (i - begin) * tile);
        }
      }
      base_panel = p;
      for (int64_t i = begin; i < end; ++i) {
        A* const sums = tiles.get() + (i - begin) * tile;
        if (bases != 0) {
          k.add(c.pieces[i].rows, base_tiles.get() + i % bases * tile, sums);
        }
        finish(c.pieces[i], p, sums);
      }
    }

   private:
    void multiply(const Piece& piece, int64_t from, int64_t to, A* sums) const {
      const Active<A>& a = c.active[l][piece.sample];
      const int64_t i = a.from(from), count = (to == link.units ? a.count : a.from(to)) - i;
      const A* const values = c.values_of(l, piece) + i * piece.rows;
      k.multiply(piece.rows, values, a.units + i, count, from, panel.get(), from == 0 ? nullptr : sums, sums);
    }

    void finish(const Piece& piece, int64_t p, const A* sums) const {
      const ChainTask& t = c.t;
      const int64_t column = p * k.columns, width = std::min(k.columns, link.columns - column);
      const int64_t row = piece.sample * t.rows + piece.row;
      if (l + 1 < t.links.size()) {
        const Active<A>& next = c.active[l + 1][piece.sample];
        const int64_t i = next.from(column), count = next.before(column + width, i);
        const A* const factors = next.factors == nullptr ? nullptr : next.factors + i;
        k.pick(sums, piece.rows, next.units + i, factors, count, column, c.values_of(l + 1, piece) + i * piece.rows);
      } else if (t.out != nullptr) {
        const int64_t place = (first * t.rows + row) * link.columns + column;
        k.write(sums, piece.rows, width, t.out + place * t.element, link.columns);
      } else {
        k.square(sums, piece.rows, c.partial.get() + row * c.panels(link) + p, c.panels(link));
      }
    }

    const Chain& c;
    const ProductKernels& k;
    const Link& link;
    const size_t l;
    const int64_t first, bases, tile;
    int64_t packed_panel = -1, packed_from = -1, base_panel = -1;
    Scratch<A> panel, tiles, base_tiles;
  };

  // The same where the next link's units that are off need no columns.
  class NarrowWorker {
   public:
    NarrowWorker(const Chain& chain, size_t l, int64_t, int64_t pieces)
        : c(chain),
          k(chain.k),
          link(chain.t.links[l]),
          l(l),
          bases(l == 0 ? chain.bases : 0),
          block(std::max<int64_t>(1, chain.block * k.columns / kWidePanel)),
          tile(k.rows * ChosenColumns::kTile),
          chosen(pieces),
          panel(std::min(block, link.units) * kWidePanel),
          tiles(pieces * ChosenColumns::kTiles * tile),
          base_tiles(bases * ChosenColumns::kTiles * tile) {
      every.choose_all();
    }

    void run(int64_t p, int64_t begin, int64_t end) {
      const Piece* const base = c.pieces.data() + c.owned;
      const bool new_base = p != base_panel;
      for (int64_t i = begin; i < end; ++i) {
        chosen[i - begin].choose(c.active[l + 1][c.pieces[i].sample], p * kWidePanel);
      }
      for (int64_t from = 0; from < link.units; from += block) {
        const int64_t to = std::min(from + block, link.units);
        if (packed_panel != p || packed_from != from) {
          k.pack_wide(link.weight, link.columns, p * kWidePanel, from, to, panel.get());
          packed_panel = p, packed_from = from;
        }
        for (int64_t i = 0; new_base && i < bases; ++i) {
          multiply(base[i], every, from, to, sums(base_tiles, i));
        }
        for (int64_t i = begin; i < end; ++i) {
          multiply(c.pieces[i], chosen[i - begin], from, to, sums(tiles, i - begin));
        }
      }
      base_panel = p;
      for (int64_t i = begin; i < end; ++i) {
        const A* const common = bases == 0 ? nullptr : sums(base_tiles, i % bases);
        finish(c.pieces[i], chosen[i - begin], sums(tiles, i - begin), common);
      }
    }

   private:
    A* sums(const Scratch<A>& all, int64_t i) const { return all.get() + i * ChosenColumns::kTiles * tile; }

    void multiply(const Piece& piece, const ChosenColumns& columns, int64_t from, int64_t to, A* sums) const {
      const Active<A>& a = c.active[l][piece.sample];
      const int64_t i = a.from(from), count = (to == link.units ? a.count : a.from(to)) - i;
      const A* const values = c.values_of(l, piece) + i * piece.rows;
      for (int64_t n = 0; n < columns.tiles(); ++n, sums += tile) {
        k.multiply_chosen(
            piece.rows, values, a.units + i, count, from, panel.get(), columns.lanes[n], from == 0 ? nullptr : sums,
            sums);
      }
    }

    // The sum in row 0 of a lane, counted over both tiles.
    const A* lane(const A* sums, int64_t at) const {
      return sums + at / ChosenColumns::kTile * tile + at % ChosenColumns::kTile;
    }

    void finish(const Piece& piece, const ChosenColumns& columns, const A* sums, const A* base) const {
      A* to = c.values_of(l + 1, piece) + columns.place * piece.rows;
      for (int64_t i = 0; i < columns.count; ++i, to += piece.rows) {
        const A* const own = lane(sums, columns.at[i]);
        const A* const common = base == nullptr ? nullptr : lane(base, every.at[columns.column[i]]);
        for (int64_t r = 0; r < piece.rows; ++r) {
          const int64_t line = r * ChosenColumns::kTile;
          to[r] = common == nullptr ? own[line] : own[line] + common[line];
        }
      }
    }

    const Chain& c;
    const ProductKernels& k;
    const Link& link;
    const size_t l;
    const int64_t bases, block, tile;
    int64_t packed_panel = -1, packed_from = -1, base_panel = -1;
    std::vector<ChosenColumns> chosen;
    ChosenColumns every;
    Scratch<A> panel, tiles, base_tiles;
  };

  void add_squares(int64_t first, int64_t count) const {
    A* const result = static_cast<A*>(t.squares) + first * t.rows;
    const int64_t parts = panels(t.links.back());
    for (int64_t r = 0; r < count * t.rows; ++r) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) {
        sum += partial.get()[r * parts + p];
      }
      result[r] = static_cast<A>(sum);
    }
  }

  const ChainTask& t;
  const ProductKernels& k;
  const int64_t widest;  // most units of a link
  const int64_t most;    // samples at a time
  const int64_t block;   // units of a panel that are packed at a time
  Scratch<A> values[2];  // before every other link
  Scratch<A> partial;    // squares by sample, row and panel
  std::vector<ActiveUnits<A>> active;
  std::vector<Piece> pieces;
  int64_t owned = 0, bases = 0;  // pieces of samples, and of the base
  bool shares;
};

}  // namespace emr::cpu
