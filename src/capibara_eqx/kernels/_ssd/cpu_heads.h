// What both directions share. A head's state, a row for each of its channels, is cut
// into blocks of a few rows and a few registers of columns. A block stays in registers
// over the tokens between two resets of a chunk.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "scratch.h"

namespace capibara {

constexpr int kRows = 4;
// Sixteen registers of state beside the operands, or eight where there are only sixteen.
constexpr int kColumns = kRegisterBytes == 64 ? 4 : 2;
template <typename T>
constexpr int kBlock = kColumns * kLanes<T>;

// The operands; what is absent is null. Shapes as in `_operands.py`, dense, last axis
// fastest.
template <typename T>
struct Dual {
  int64_t rows, seq, n_heads, head_dim, n_groups, d_state, chunk;
  const T *x, *log_decay, *coefficient, *B, *C, *initial_state;
  const bool* reset;

  int64_t chunks() const { return (seq + chunk - 1) / chunk; }
  int64_t state_size() const { return head_dim * d_state; }
  int64_t group(int64_t head) const { return head / (n_heads / n_groups); }
  // Up to whole blocks, zero beyond the real ones.
  int64_t padded_rows() const { return (head_dim + kRows - 1) / kRows * kRows; }
  // One block at least: the first one writes y, also where there are no states.
  int64_t padded_columns() const {
    const int64_t blocks = (d_state + kBlock<T> - 1) / kBlock<T>;
    return std::max<int64_t>(blocks, 1) * kBlock<T>;
  }
  int64_t padded_state() const { return padded_rows() * padded_columns(); }
  bool is_reset(int64_t row, int64_t token) const {
    return reset != nullptr && reset[row * seq + token];
  }
};

// A head's state from where it lies dense to whole blocks, and back; null is zeros.
template <typename T>
void read_state(const Dual<T>& dual, const T* from, T* to) {
  const int64_t columns = dual.padded_columns();
  std::fill(to, to + dual.padded_state(), T(0));
  if (from == nullptr) return;
  for (int64_t p = 0; p < dual.head_dim; ++p) {
    std::copy(from + p * dual.d_state, from + (p + 1) * dual.d_state, to + p * columns);
  }
}

template <typename T>
void write_state(const Dual<T>& dual, const T* from, T* to) {
  const int64_t columns = dual.padded_columns();
  for (int64_t p = 0; p < dual.head_dim; ++p) {
    const T* const channel = from + p * columns;
    std::copy(channel, channel + dual.d_state, to + p * dual.d_state);
  }
}

// B or C of one group at the tokens of a chunk, whole blocks a token: where they lie if
// they are whole, else copied to `padded`.
template <typename T>
struct Maps {
  const T* at;
  int64_t stride;

  static size_t size(const Dual<T>& dual) { return dual.chunk * dual.padded_columns(); }

  Maps(const Dual<T>& dual, const T* maps, int64_t row, int64_t group, int64_t token,
       int64_t count, T* padded) {
    const int64_t columns = dual.padded_columns();
    const int64_t first = (row * dual.seq + token) * dual.n_groups + group;
    const T* const from = maps + first * dual.d_state;
    const int64_t apart = dual.n_groups * dual.d_state;
    if (columns == dual.d_state) {
      at = from, stride = apart;
      return;
    }
    for (int64_t t = 0; t < count; ++t) {
      std::copy(from + t * apart, from + t * apart + dual.d_state, padded + t * columns);
      std::fill(padded + t * columns + dual.d_state, padded + (t + 1) * columns, T(0));
    }
    at = padded, stride = columns;
  }
};

// Where the run of tokens from `first` on ends: at the next reset, or with the chunk.
template <typename T>
int64_t end_of_run(const Dual<T>& dual, int64_t row, int64_t token, int64_t first,
                   int64_t count) {
  int64_t end = first + 1;
  while (end < count && !dual.is_reset(row, token + end)) ++end;
  return end;
}

// e^a of a head at the tokens of a chunk.
template <typename T>
void read_decays(const Dual<T>& dual, int64_t row, int64_t head, int64_t token,
                 int64_t count, T* decays) {
  const T* from = dual.log_decay + (row * dual.seq + token) * dual.n_heads + head;
  for (int64_t t = 0; t < count; ++t) decays[t] = std::exp(from[t * dual.n_heads]);
}

template <typename T>
T coefficient(const Dual<T>& dual, int64_t row, int64_t head, int64_t token) {
  if (dual.coefficient == nullptr) return T(1);
  return dual.coefficient[(row * dual.seq + token) * dual.n_heads + head];
}

// Channels `first` to `first + kRows` of a head in a stream (rows, seq, n_heads,
// head_dim), zero beyond the last one; times the coefficient if `scaled`.
template <typename T>
void read_rows(const Dual<T>& dual, const T* stream, int64_t row, int64_t head,
               int64_t token, int64_t count, int64_t first, bool scaled, T* to) {
  const int64_t some = std::min<int64_t>(kRows, dual.head_dim - first);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = (row * dual.seq + token + t) * dual.n_heads + head;
    const T factor = scaled ? coefficient(dual, row, head, token + t) : T(1);
    for (int64_t p = 0; p < kRows; ++p) {
      to[t * kRows + p] =
          p < some ? factor * stream[at * dual.head_dim + first + p] : T(0);
    }
  }
}

template <typename T>
void write_rows(const Dual<T>& dual, const T* from, int64_t row, int64_t head,
                int64_t token, int64_t count, int64_t first, T* stream) {
  const int64_t some = std::min<int64_t>(kRows, dual.head_dim - first);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = (row * dual.seq + token + t) * dual.n_heads + head;
    std::copy(from + t * kRows, from + t * kRows + some,
              stream + at * dual.head_dim + first);
  }
}

// The sum over the lanes of each of `count` registers. They are taken `kLanes` at a time:
// both arrays have room for so many more.
template <typename T>
void sum_each(const Lanes<T>* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, sums<T>(x + i));
}

}  // namespace capibara
