// The functions of `lanes.h` over arrays, for `test_native_math.py`.
#include <cstdint>

#include "lanes.h"

namespace {

using namespace capibara;

template <typename T, typename Function>
void map(int64_t count, const T* x, T* y, Function function) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store_some<T>(y + i, function(load_some<T>(x + i, count - i)), count - i);
  }
}

template <typename T>
void powers_of_products(int64_t count, const T* a, const T* b, T* y) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Lanes<T> left = load_some<T>(a + i, count - i);
    const Lanes<T> right = load_some<T>(b + i, count - i);
    store_some<T>(y + i, exp2_of_bounded<T>(left, right), count - i);
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void

#define FUNCTIONS(T)                                                          \
  EXPORT exp2_of_any_##T(int64_t count, const T* x, T* y) {                   \
    map<T>(count, x, y, [](Lanes<T> lanes) { return exp2_of_any<T>(lanes); }); \
  }                                                                           \
  EXPORT sigmoid_##T(int64_t count, const T* x, T* y) {                       \
    map<T>(count, x, y, [](Lanes<T> lanes) { return sigmoid<T>(lanes); });    \
  }                                                                           \
  EXPORT softplus_##T(int64_t count, const T* x, T* y) {                      \
    map<T>(count, x, y, [](Lanes<T> lanes) { return softplus<T>(lanes); });   \
  }                                                                           \
  EXPORT exp2_of_bounded_##T(int64_t count, const T* a, const T* b, T* y) {   \
    powers_of_products<T>(count, a, b, y);                                    \
  }

FUNCTIONS(float)
FUNCTIONS(double)
