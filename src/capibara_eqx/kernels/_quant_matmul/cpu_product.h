// A block of rows of packed codes times all tokens, in whole numbers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scratch.h"

namespace capibara {

// A register has four codes of each of 16 rows, and sums of these rows. A tile of six
// tokens by four registers leaves room for the codes among the 32 registers.
typedef int32_t Sums __attribute__((vector_size(64)));
typedef uint32_t Quads __attribute__((vector_size(64)));
constexpr int64_t kLanesOfRows = 16;
constexpr int64_t kVectors = 4;
constexpr int64_t kRows = kLanesOfRows * kVectors;
constexpr int kTokens = 6;

// Two things of this library that the compiler does not find by itself. The first is to
// multiply unsigned bytes by signed ones, four products a sum.
inline Sums dot4(Sums sums, Quads codes, Quads x) {
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                    reinterpret_cast<__m512i>(codes),
                                                    reinterpret_cast<__m512i>(x)));
}

// The second is to make columns of rows, 16 by 16: blocks of 1, 2, 4 and 8 change places.
inline void transpose(Quads (&rows)[kLanesOfRows]) {
#pragma GCC unroll 4
  for (uint32_t size = 1; size < kLanesOfRows; size *= 2) {
    Quads upper, lower;
    for (uint32_t lane = 0; lane < kLanesOfRows; ++lane) {
      const bool right = lane & size;
      upper[lane] = right ? kLanesOfRows + lane - size : lane;
      lower[lane] = right ? kLanesOfRows + lane : lane + size;
    }
#pragma GCC unroll 16
    for (uint32_t row = 0; row < kLanesOfRows; ++row) {
      if (row & size) continue;
      const auto a = reinterpret_cast<__m512i>(rows[row]);
      const auto b = reinterpret_cast<__m512i>(rows[row + size]);
      rows[row] = reinterpret_cast<Quads>(
          _mm512_permutex2var_epi32(a, reinterpret_cast<__m512i>(upper), b));
      rows[row + size] = reinterpret_cast<Quads>(
          _mm512_permutex2var_epi32(a, reinterpret_cast<__m512i>(lower), b));
    }
  }
}

// All of one call. `x` has, for each token and place in a byte, the inputs that the codes
// there multiply, zeros up to `width`, a multiple of four. `zero` and `sums`, those of
// the tokens, are as `scale` by group, `scale` and `zero` with the rows last.
struct Product {
  int64_t tokens, rows, bytes, width, groups, group_bytes;
  int bits;
  const int8_t* x;
  const uint8_t* codes;
  const float *scale, *step;
  const int32_t *zero, *sums;

  int64_t places() const { return 8 / bits; }
  int64_t quads() const { return width / 4; }
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
};

// `kCount` tokens, `stride` apart, times so many quads of codes.
template <int kCount>
inline void multiply(const Quads* codes, int64_t quads, const int8_t* x, int64_t stride,
                     Sums (&sums)[kTokens][kVectors]) {
  Sums own[kCount][kVectors];
  for (int t = 0; t < kCount; ++t) {
    for (int v = 0; v < kVectors; ++v) own[t][v] = sums[t][v];
  }
  for (int64_t q = 0; q < quads; ++q) {
    const Quads* now = codes + q * kVectors;
#pragma GCC unroll 6
    for (int t = 0; t < kCount; ++t) {
      uint32_t four;
      std::memcpy(&four, x + t * stride + 4 * q, sizeof four);
      const Quads all = four - Quads{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) own[t][v] = dot4(own[t][v], now[v], all);
    }
  }
  for (int t = 0; t < kCount; ++t) {
    for (int v = 0; v < kVectors; ++v) sums[t][v] = own[t][v];
  }
}

// 16 quads of 16 rows, by quad; what is not there is zero.
inline void read_square(const Product& product, int64_t row, int64_t byte,
                        Quads (&square)[kLanesOfRows]) {
  const int64_t count = std::min(kLanesOfRows, product.rows - row);
  const int64_t size = std::min<int64_t>(sizeof(Quads), product.bytes - byte);
  for (int64_t r = 0; r < kLanesOfRows; ++r) {
    const uint8_t* from = product.codes + (row + r) * product.bytes + byte;
    if (r < count && size == sizeof(Quads)) {
      std::memcpy(&square[r], from, sizeof(Quads));
    } else {
      square[r] = Quads{};
      if (r < count) std::memcpy(&square[r], from, size);
    }
  }
  transpose(square);
}

// By place, the codes of a block of rows: quad after quad, rows on the lanes.
inline void decode(const Product& product, int64_t first, int64_t count, Quads* codes) {
  const int64_t quads = product.quads();
  const uint32_t mask = 0x01010101u * ((1u << product.bits) - 1);
  for (int64_t v = 0; v * kLanesOfRows < count; ++v) {
    for (int64_t q = 0; q < quads; q += kLanesOfRows) {
      Quads square[kLanesOfRows];
      read_square(product, first + v * kLanesOfRows, 4 * q, square);
      const int64_t there = std::min(kLanesOfRows, quads - q);
      for (int64_t place = 0; place < product.places(); ++place) {
        const int shift = static_cast<int>(place) * product.bits;
        Quads* at = codes + (place * quads + q) * kVectors + v;
        for (int64_t i = 0; i < there; ++i) at[i * kVectors] = (square[i] >> shift) & mask;
      }
    }
  }
}

template <int kCount>
void multiply_tile(const Product& product, const Quads* codes, int64_t first,
                   int64_t count, int64_t token, float* y) {
  const int64_t quads = product.quads(), places = product.places();
  const int8_t* x = product.x + token * places * product.width;
  float tile[kTokens][kRows] = {};
  for (int64_t group = 0; group < product.groups; ++group) {
    // A group begins with a quad, if there are several.
    const int64_t begin = group * product.group_bytes / 4;
    const int64_t end = group + 1 == product.groups
                            ? quads
                            : (group + 1) * product.group_bytes / 4;
    Sums sums[kTokens][kVectors] = {};
    for (int64_t place = 0; place < places; ++place) {
      multiply<kCount>(codes + (place * quads + begin) * kVectors, end - begin,
                       x + place * product.width + 4 * begin, places * product.width,
                       sums);
    }
    const float* scale = product.scale + group * product.rows + first;
    const int32_t* zero = product.zero + group * product.rows + first;
    for (int t = 0; t < kCount; ++t) {
      const int32_t of_token = product.sums[(token + t) * product.groups + group];
      const auto* whole = reinterpret_cast<const int32_t*>(sums[t]);
      for (int64_t r = 0; r < count; ++r) {
        tile[t][r] += scale[r] * static_cast<float>(whole[r] - zero[r] * of_token);
      }
    }
  }
  for (int t = 0; t < kCount; ++t) {
    float* out = y + (token + t) * product.rows + first;
    const float step = product.step[token + t];
    for (int64_t r = 0; r < count; ++r) out[r] = step * tile[t][r];
  }
}

// One block of rows for all tokens.
inline void multiply_block(const Product& product, int64_t block, float* y) {
  const int64_t first = block * kRows, count = std::min(kRows, product.rows - first);
  const int64_t size = product.places() * product.quads() * kVectors;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(size * sizeof(Quads));
  Quads* codes = scratch.take<Quads>(size);
  decode(product, first, count, codes);
  for (int64_t token = 0; token < product.tokens; token += kTokens) {
    const auto run = [&](auto tile) { tile(product, codes, first, count, token, y); };
    switch (std::min<int64_t>(kTokens, product.tokens - token)) {
      case 1: run(multiply_tile<1>); break;
      case 2: run(multiply_tile<2>); break;
      case 3: run(multiply_tile<3>); break;
      case 4: run(multiply_tile<4>); break;
      case 5: run(multiply_tile<5>); break;
      default: run(multiply_tile<6>); break;
    }
  }
}

}  // namespace capibara
