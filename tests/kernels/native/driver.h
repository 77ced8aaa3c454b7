// What the drivers share: arrays that are heap blocks of exactly their size, how far
// numbers are from those expected, and what has to be noticed.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lanes.h"
#include "pool.h"

namespace capibara {

inline int failures = 0;

template <typename T>
std::vector<T> drawn(std::mt19937& random, int64_t count, double low, double high) {
  std::vector<T> values(count);
  std::uniform_real_distribution<double> between(low, high);
  for (T& value : values) value = static_cast<T>(between(random));
  return values;
}

// For a result: what is not written stays visible.
template <typename T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, T(1e30));
}

// As `cpu.cc` does: what has no elements is null.
template <typename T>
T* pointer(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

template <typename T>
using Named = std::vector<std::pair<const char*, const std::vector<T>*>>;

// (rows, parts, ...) summed over the parts.
template <typename T>
std::vector<T> sum_parts(const std::vector<T>& apart, int64_t rows, int64_t parts,
                         int64_t size) {
  std::vector<T> sums(rows * size);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) {
        sums[row * size + i] += apart[(row * parts + part) * size + i];
      }
    }
  }
  return sums;
}

// In which way numbers are others than arithmetic in T explains, or nothing. It explains
// a few roundings of each term, and errors of either sign: they are taken of the largest
// number or, where terms cancel, of the largest term.
template <typename T>
std::string difference(const std::vector<T>& got, const std::vector<double>& want,
                       double terms, double largest_term) {
  if (got.size() != want.size()) return "wrong size";
  double largest = largest_term, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    const double error = std::abs(got[i] - want[i]);
    // NaN is worst, and stays.
    worst = worst >= error || worst != worst ? worst : error;
  }
  const double rounding = std::numeric_limits<T>::epsilon() * largest;
  const double allowed = 8 * std::sqrt(terms) * rounding;
  if (worst <= allowed) return "";
  char what[99];
  std::snprintf(what, sizeof what, "off by %.2e, allowed %.2e", worst, allowed);
  return what;
}

// The whole program: `check` everything, or do what has to be noticed.
inline int drive(int count, char** arguments, const std::function<void(Pool&)>& check,
                 const std::function<void(Pool&)>& spoil) {
  const std::string wish = count > 1 ? arguments[1] : "";
  Pool pool(3);
  if (wish == "overrun") {
    std::vector<float> values(3);
    std::printf("%g\n", sum<float>(load<float>(values.data())));
  } else if (wish == "race") {
    int total = 0;
    pool.schedule([&] { ++total; });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::printf("%d\n", ++total);
  } else if (wish == "spoil") {
    spoil(pool);
  } else {
    check(pool);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace capibara
