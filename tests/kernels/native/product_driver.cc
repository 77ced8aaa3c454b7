// The packed product in C++ without Python and XLA: against plain loops in whole numbers,
// over odd sizes, on threads of its own. Made to run under sanitizers; every array is a
// heap block of exactly its size.
//
// With the argument `spoil`, `overrun` or `race` it does what has to be noticed.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu_product.h"
#include "driver.h"

namespace {

using namespace capibara;

struct Case {
  int64_t tokens, rows, size;
  int bits;
  int64_t group_bytes;  // none for one group
};

template <typename T>
std::vector<T> whole(std::mt19937& random, int64_t count, int low, int high) {
  std::uniform_int_distribution<int> between(low, high);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(between(random));
  return values;
}

void check(const Case& c, Pool& pool, bool spoiled = false) {
  std::mt19937 random(static_cast<unsigned>(c.tokens * 97 + c.rows * 7 + c.size));
  const int64_t places = 8 / c.bits, bytes = (c.size + places - 1) / places;
  const int64_t width = (bytes + 3) / 4 * 4;
  const int64_t group_bytes = c.group_bytes == 0 ? bytes : c.group_bytes;
  const int64_t groups = (bytes + group_bytes - 1) / group_bytes;
  // What is left of a last byte holds anything: the inputs there are zero.
  const auto codes = whole<uint8_t>(random, c.rows * bytes, 0, 255);
  const auto inputs = whole<int8_t>(random, c.tokens * c.size, -127, 127);
  const auto zero = whole<int32_t>(random, groups * c.rows, 0, (1 << c.bits) - 1);
  const auto scale = drawn<float>(random, groups * c.rows, 0.5, 1);
  const auto step = drawn<float>(random, c.tokens, 0.5, 1);
  std::vector<int8_t> x(c.tokens * places * width);
  std::vector<int32_t> sums(c.tokens * groups);
  std::vector<double> want(c.tokens * c.rows);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.size; ++i) {
      const int value = inputs[t * c.size + i];
      const int64_t byte = i / places, group = byte / group_bytes;
      x[(t * places + i % places) * width + byte] = static_cast<int8_t>(value);
      sums[t * groups + group] += value;
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t at = group * c.rows + r;
        const int code = codes[r * bytes + byte] >> (i % places * c.bits);
        const int steps = (code & ((1 << c.bits) - 1)) - zero[at];
        want[t * c.rows + r] += double(step[t]) * scale[at] * value * steps;
      }
    }
  }
  auto y = unwritten<float>(c.tokens * c.rows);
  const Product product{c.tokens,     c.rows,       bytes,       width,
                        groups,       group_bytes,  c.bits,      x.data(),
                        codes.data(), scale.data(), step.data(), zero.data(),
                        sums.data()};
  pool.run_tasks(product.blocks(), 4, [&](int64_t block) {
    multiply_block(product, block, y.data());
  });
  if (spoiled) y[0] += 1000;
  // Exact but for a rounding a group and a few of the result.
  const std::string wrong = difference<float>(y, want, double(groups), 1);
  if (wrong.empty()) return;
  ++failures;
  std::printf("%ld tokens, %ld rows, %ld codes of %d bits: %s\n", long(c.tokens),
              long(c.rows), long(c.size), c.bits, wrong.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  const auto check_everything = [](Pool& pool) {
    for (const int bits : {2, 4, 8}) {
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 13}) {
        for (const int64_t size : {1, 3, 17, 64, 255, 257, 530}) {
          for (const int64_t rows : {1, 16, 63, 64, 65, 130}) {
            check({tokens, rows, size, bits, 0}, pool);
          }
        }
      }
      check({7, 20, 333, bits, 4}, pool);
      check({3, 65, 700, bits, 64}, pool);
    }
  };
  const auto spoil = [](Pool& pool) { check({2, 3, 5, 4, 0}, pool, true); };
  return drive(count, arguments, check_everything, spoil);
}
