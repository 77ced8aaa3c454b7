// One register of numbers, and the functions of it that the kernels need.
//
// The vector types are those of GCC and Clang, so that what is meant to stay in
// registers does. They name no instruction set: the compiler maps them to whatever the
// processor has, down to scalars.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace capibara {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T>
struct Number;

// The polynomial is 2^f - 1 over f, for |f| <= 1/2: a minimax fit for float (relative
// error of 2^f 9e-8), the Taylor series for double (4e-18).
template <>
struct Number<float> {
  typedef float Lanes __attribute__((vector_size(kRegisterBytes)));
  // Unsigned, since the bits of what is out of range run over.
  typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kMantissa = 23;
  static constexpr float kLargestExponent = 128.0f;
  static constexpr float kSmallestExponent = -126.0f;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: rounds by addition
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kPolynomial[] = {0.693147f, 0.24022242f, 0.055507336f,
                                          0.009671513f, 0.0013264727f};
  static constexpr int kLogTerms = 7;
};

template <>
struct Number<double> {
  typedef double Lanes __attribute__((vector_size(kRegisterBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kMantissa = 52;
  static constexpr double kLargestExponent = 1024.0;
  static constexpr double kSmallestExponent = -1022.0;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kPolynomial[] = {
      6.9314718055994530942e-01, 2.4022650695910071233e-01, 5.5504108664821579953e-02,
      9.6181291076284771619e-03, 1.3333558146428443423e-03, 1.5403530393381609954e-04,
      1.5252733804059840280e-05, 1.3215486790144309488e-06, 1.0178086009239699728e-07,
      7.0549116208011233299e-09, 4.4455382718708114976e-10, 2.5678435993488205142e-11,
      1.3691488853904128881e-12};
  static constexpr int kLogTerms = 16;
};

template <typename T>
using Lanes = typename Number<T>::Lanes;
template <typename T>
using Bits = typename Number<T>::Bits;
template <typename T>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));

template <typename T>
constexpr T kLog2e = static_cast<T>(1.44269504088896340736L);
template <typename T>
constexpr T kLn2 = static_cast<T>(0.69314718055994530942L);

template <typename T>
inline Lanes<T> load(const T* from) {
  Lanes<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
inline void store(T* to, Lanes<T> x) {
  std::memcpy(to, &x, sizeof x);
}

// Up to a register of numbers, zero beyond `count`.
template <typename T>
inline Lanes<T> load_some(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  Lanes<T> x{};
  std::memcpy(&x, from, count * sizeof(T));
  return x;
}

template <typename T>
inline void store_some(T* to, Lanes<T> x, int64_t count) {
  if (count >= kLanes<T>) {
    store(to, x);
  } else {
    std::memcpy(to, &x, count * sizeof(T));
  }
}

template <typename T>
inline Lanes<T> all(T x) {
  return x - Lanes<T>{};
}

template <typename T>
inline Lanes<T> absolute(Lanes<T> x) {
  return x < T(0) ? -x : x;
}

// NaN if one of them is.
template <typename T>
inline Lanes<T> larger(Lanes<T> a, Lanes<T> b) {
  return (a > b) | (a != a) ? a : b;
}

template <typename T>
inline T sum(Lanes<T> x) {
  constexpr int kHalf = kLanes<T> / 2;
  T half[kHalf];
  const T* p = reinterpret_cast<const T*>(&x);
  for (int i = 0; i < kHalf; ++i) half[i] = p[i] + p[i + kHalf];
  T total = half[0];
  for (int i = 1; i < kHalf; ++i) total += half[i];
  return total;
}

// The lanes of `a`, then those of `b`, that the numbers name.
template <typename T, int... from>
inline Lanes<T> lanes_of(Lanes<T> a, Lanes<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, Bits<T>{from...});
#endif
}

// Lane `i` of two registers cut into runs of `kWidth` lanes, the lower halves of the runs
// of both by turns.
template <typename T, int kWidth>
constexpr int by_turns(int i) {
  constexpr int kHalf = kWidth / 2;
  return i / kHalf % 2 * kLanes<T> + i / kWidth * kWidth + i % kHalf;
}

// The runs of `a` and `b` by turns, each folded to half its width.
template <typename T, int kWidth, int... i>
inline Lanes<T> folded(Lanes<T> a, Lanes<T> b, std::integer_sequence<int, i...>) {
  return lanes_of<T, by_turns<T, kWidth>(i)...>(a, b) +
         lanes_of<T, (by_turns<T, kWidth>(i) + kWidth / 2)...>(a, b);
}

template <typename T, int kWidth>
inline Lanes<T> fold(Lanes<T>* x) {
  if constexpr (kWidth == 1) {
    return x[0];
  } else {
    constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>();
#pragma GCC unroll 8
    for (int k = 0; k < kWidth / 2; ++k) {
      x[k] = folded<T, kWidth>(x[k], x[k + kWidth / 2], kAll);
    }
    return fold<T, kWidth / 2>(x);
  }
}

// The sums over the lanes of as many registers as there are lanes, one a lane.
template <typename T>
inline Lanes<T> sums(const Lanes<T>* x) {
  Lanes<T> left[kLanes<T>];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<T>; ++k) left[k] = x[k];
  return fold<T, kLanes<T>>(left);
}

template <typename T>
inline T largest(Lanes<T> x) {
  T found = x[0];
  for (int i = 1; i < kLanes<T>; ++i) found = found > x[i] || found != found ? found : x[i];
  return found;
}

// 2^(fraction + whole), where `rounded` is `whole` plus the rounder.
template <typename T>
inline Lanes<T> scaled_power(Lanes<T> fraction, Lanes<T> rounded) {
  using N = Number<T>;
  constexpr int kTerms = sizeof(N::kPolynomial) / sizeof(T);
  Lanes<T> p = all<T>(N::kPolynomial[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) p = p * fraction + N::kPolynomial[k];
  p = p * fraction + T(1);
  // The lowest bits of `rounded` are the whole number; the shift drops all others.
  const Bits<T> exponent = (Bits<T>)rounded << N::kMantissa;
  return (Lanes<T>)((Bits<T>)p + exponent);
}

// 2^(x y) for |x y| below the exponents' range: nothing is clamped. The product enters
// unrounded, by fused multiply-adds.
template <typename T>
inline Lanes<T> exp2_of_bounded(Lanes<T> x, Lanes<T> y) {
  using N = Number<T>;
  const Lanes<T> rounded = x * y + N::kRounder;
  const Lanes<T> whole = rounded - N::kRounder;
  return scaled_power<T>(x * y - whole, rounded);
}

// 2^x for every x: zero below the normal numbers, infinite above, NaN for NaN.
template <typename T>
inline Lanes<T> exp2_of_any(Lanes<T> x) {
  using N = Number<T>;
  x = x > N::kLargestExponent ? all<T>(N::kLargestExponent) : x;
  const Lanes<T> rounded = x + N::kRounder;
  const Lanes<T> whole = rounded - N::kRounder;
  const Lanes<T> power = scaled_power<T>(x - whole, rounded);
  // What compares with nothing is NaN, and its bits are no power of two.
  return x >= N::kSmallestExponent ? power : x < N::kSmallestExponent ? Lanes<T>{} : x;
}

// e^x for x <= 0: the reduction is in two parts, since x is not small.
template <typename T>
inline Lanes<T> exp_of_negative(Lanes<T> x) {
  using N = Number<T>;
  const Lanes<T> rounded = x * kLog2e<T> + N::kRounder;
  const Lanes<T> whole = rounded - N::kRounder;
  const Lanes<T> rest = (x - whole * N::kLn2High) - whole * N::kLn2Low;
  const Lanes<T> power = scaled_power<T>(rest * kLog2e<T>, rounded);
  const Lanes<T> exponent = x * kLog2e<T>;
  return exponent >= N::kSmallestExponent  ? power
         : exponent < N::kSmallestExponent ? Lanes<T>{}
                                           : x;
}

// 1 / (1 + e^-x).
template <typename T>
inline Lanes<T> sigmoid(Lanes<T> x) {
  const Lanes<T> e = exp_of_negative<T>(-absolute<T>(x));
  return (x < T(0) ? e : all<T>(T(1))) / (e + T(1));
}

// log(1 + e^x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = e^-|x|, by the series of
// artanh up to an argument of 1/3.
template <typename T>
inline Lanes<T> softplus(Lanes<T> x) {
  const Lanes<T> e = exp_of_negative<T>(-absolute<T>(x));
  const Lanes<T> s = e / (e + T(2));
  const Lanes<T> square = s * s;
  constexpr int kTerms = Number<T>::kLogTerms;
  Lanes<T> p = all<T>(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) p = p * square + T(1) / (2 * k + 1);
  return (x < T(0) ? Lanes<T>{} : x) + (s + s) * p;
}

}  // namespace capibara
