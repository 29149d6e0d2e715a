// Bits of (leaky) ReLUs as lists of units with factors: what a product over units that are on sums over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace emr::cpu {

// Bits [begin, begin + 64), of which those from `end` on are 0.
inline uint64_t word_at(const uint8_t* bits, int64_t begin, int64_t end) {
  const int64_t first = begin / 8, last = (std::min(begin + 64, end) + 7) / 8;
  uint8_t bytes[9] = {};
  std::memcpy(bytes, bits + first, static_cast<size_t>(last - first));
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  const int shift = static_cast<int>(begin % 8);
  if (shift != 0) {
    word = word >> shift | static_cast<uint64_t>(bytes[8]) << (64 - shift);
  }
  return end - begin >= 64 ? word : word & ((uint64_t{1} << (end - begin)) - 1);
}

// For each bit of `width` words whether it is set in more than half of `count` rows of them.
inline std::vector<uint64_t> majority(const std::vector<uint64_t>& rows, int64_t count, int64_t width) {
  constexpr int kDigits = 32;
  std::vector<uint64_t> result(width);
  for (int64_t w = 0; w < width; ++w) {
    uint64_t counts[kDigits] = {};  // binary digits of 64 counts, side by side
    for (int64_t n = 0; n < count; ++n) {
      uint64_t carry = rows[n * width + w];
      for (int digit = 0; carry != 0; ++digit) {
        const uint64_t both = counts[digit] & carry;
        counts[digit] ^= carry;
        carry = both;
      }
    }
    uint64_t more = 0, equal = ~uint64_t{0};
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      if ((count / 2) >> digit & 1) {
        equal &= counts[digit];
      } else {
        more |= equal & counts[digit];
        equal &= ~counts[digit];
      }
    }
    result[w] = more;
  }
  return result;
}

// The units that one sample sums over, in rising order, and what their values are multiplied by (null: 1).
template <class A>
struct Active {
  const int32_t* units;
  const A* factors;
  int64_t count;

  // Place of the first unit from `unit` on.
  int64_t from(int64_t unit) const {
    return unit == 0 ? 0 : std::lower_bound(units, units + std::min(unit, count), unit) - units;
  }

  // How many units there are before `unit`, from a place on; for a near one.
  int64_t before(int64_t unit, int64_t place) const {
    int64_t end = place;
    while (end < count && units[end] < unit) {
      ++end;
    }
    return end - place;
  }
};

// The lists of up to `most` samples of `units` units at a time; and of a base, where that makes the lists shorter.
template <class A>
class ActiveUnits {
 public:
  ActiveUnits(int64_t most, int64_t units, double slope)
      : size_(units),
        width_((units + 63) / 64),
        slope_(static_cast<A>(slope)),
        units_(new int32_t[(most + 1) * units]),
        factors_(new A[(most + 1) * units]) {}

  // For samples [first, first + count). `share`: their products may start from a common one, that of the base: the
  // units that are on in most samples. Lists then hold only what a sample does otherwise.
  void choose(const uint8_t* bits, int64_t first, int64_t count, bool share) {
    std::vector<uint64_t> on(count * width_);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t begin = (first + n) * size_;
      for (int64_t w = 0; w < width_; ++w) {
        on[n * width_ + w] = word_at(bits, begin + 64 * w, begin + size_);
      }
    }
    lists_.clear();
    const std::vector<uint64_t> most = share ? majority(on, count, width_) : std::vector<uint64_t>();
    has_base_ = share && saves(on, most, count);
    for (int64_t n = 0; n < count; ++n) {
      const uint64_t* row = on.data() + n * width_;
      has_base_ ? list_differences(row, most.data()) : list_units(row);
    }
    if (has_base_) {
      list_units(most.data());
    }
  }

  bool has_base() const { return has_base_; }
  const Active<A>& base() const { return lists_.back(); }
  const Active<A>& operator[](int64_t n) const { return lists_[n]; }

 private:
  // Whether the lists with a base, its own included, are shorter than without.
  bool saves(const std::vector<uint64_t>& on, const std::vector<uint64_t>& most, int64_t count) const {
    int64_t plain = 0, different = 0, base = 0;
    for (int64_t w = 0; w < width_; ++w) {
      base += __builtin_popcountll(most[w]);
      for (int64_t n = 0; n < count; ++n) {
        plain += __builtin_popcountll(on[n * width_ + w]);
        different += __builtin_popcountll(on[n * width_ + w] ^ most[w]);
      }
    }
    return slope_ != 0 ? different + size_ < count * size_ : different + base < plain;
  }

  void list_units(const uint64_t* on) {
    if (slope_ == 0) {
      list(on, nullptr);
    } else {
      std::vector<uint64_t> all(width_, ~uint64_t{0});
      all.back() >>= 64 * width_ - size_;
      list(all.data(), [&](int64_t h) { return on[h / 64] >> (h % 64) & 1 ? A(1) : slope_; });
    }
  }

  void list_differences(const uint64_t* on, const uint64_t* most) {
    std::vector<uint64_t> differs(width_);
    for (int64_t w = 0; w < width_; ++w) {
      differs[w] = on[w] ^ most[w];
    }
    list(differs.data(), [&](int64_t h) { return on[h / 64] >> (h % 64) & 1 ? A(1) - slope_ : slope_ - A(1); });
  }

  // `factor`: of a unit; null: 1 for all.
  template <class F>
  void list(const uint64_t* chosen, const F& factor) {
    const int64_t place = static_cast<int64_t>(lists_.size()) * size_;
    int32_t* const units = units_.get() + place;
    int64_t count = 0;
    for (int64_t w = 0; w < width_; ++w) {
      for (uint64_t word = chosen[w]; word != 0; word &= word - 1) {
        units[count++] = static_cast<int32_t>(64 * w + __builtin_ctzll(word));
      }
    }
    A* factors = nullptr;
    if constexpr (!std::is_null_pointer_v<F>) {
      factors = factors_.get() + place;
      for (int64_t i = 0; i < count; ++i) {
        factors[i] = factor(units[i]);
      }
    }
    lists_.push_back({units, factors, count});
  }

  int64_t size_, width_;
  A slope_;
  bool has_base_ = false;
  std::unique_ptr<int32_t[]> units_;
  std::unique_ptr<A[]> factors_;
  std::vector<Active<A>> lists_;
};

}  // namespace emr::cpu
