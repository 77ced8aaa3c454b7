// What both directions of the scan share: a tile is a few registers of neighbouring
// channels of one row, which are read a chunk of tokens at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "scratch.h"

namespace capibara {

// Registers in a tile: enough chains to hide the latency of the exponential, few enough
// that the states of a tile stay in the first-level cache.
constexpr int kRegisters = 4;
template <typename T>
constexpr int kTile = kRegisters * kLanes<T>;

// The operands; what is absent is null. Shapes as in `_operands.py`, dense, last axis
// fastest.
template <typename T>
struct Scan {
  int64_t rows, groups, seq, d_inner, d_state, chunk;
  bool softplus;
  const T *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state;
  const bool* reset;

  int64_t chunks() const { return (seq + chunk - 1) / chunk; }
  int64_t tiles() const { return (d_inner + kTile<T> - 1) / kTile<T>; }
};

// A tile's channels: where they lie in the row, and the weights that belong to them.
template <typename T>
struct Tile {
  using V = Lanes<T>;

  const Scan<T>& scan;
  const int64_t row, group, first, width;

  Tile(const Scan<T>& scan, int64_t row, int64_t tile)
      : scan(scan),
        row(row),
        group(row / (scan.rows / scan.groups)),
        first(tile * kTile<T>),
        width(std::min<int64_t>(kTile<T>, scan.d_inner - first)) {}

  // Tokens of a stream, as registers, zero in the lanes that have no channel.
  void read(const T* stream, int64_t token, int64_t count, V* to) const {
    const T* from = stream + (row * scan.seq + token) * scan.d_inner + first;
    T* into = reinterpret_cast<T*>(to);
    for (int64_t t = 0; t < count; ++t) {
      copy(from + t * scan.d_inner, into + t * kTile<T>);
    }
  }

  void write(const V* from, int64_t token, int64_t count, T* stream) const {
    T* into = stream + (row * scan.seq + token) * scan.d_inner + first;
    for (int64_t t = 0; t < count; ++t) {
      copy_out(from + t * kRegisters, into + t * scan.d_inner);
    }
  }

  // A vector over channels, one a group; zero if it is absent.
  void read_weights(const T* weights, V* to) const {
    std::fill(to, to + kRegisters, V{});
    if (weights == nullptr) return;
    copy(weights + group * scan.d_inner + first, reinterpret_cast<T*>(to));
  }

  // A vector over channels, one a row.
  void write_row(const V* from, T* vectors) const {
    copy_out(from, vectors + row * scan.d_inner + first);
  }

  // (d_inner, d_state) of `entry` to (d_state, channels of the tile), times `factor`.
  void read_states(const T* states, int64_t entry, T factor, V* to) const {
    T* into = reinterpret_cast<T*>(to);
    std::fill(into, into + scan.d_state * kTile<T>, T(0));
    const T* from = states + (entry * scan.d_inner + first) * scan.d_state;
    for (int64_t lane = 0; lane < width; ++lane) {
      for (int64_t n = 0; n < scan.d_state; ++n) {
        into[n * kTile<T> + lane] = from[lane * scan.d_state + n] * factor;
      }
    }
  }

  void write_states(const V* from, T* states) const {
    const T* values = reinterpret_cast<const T*>(from);
    T* into = states + (row * scan.d_inner + first) * scan.d_state;
    for (int64_t lane = 0; lane < width; ++lane) {
      for (int64_t n = 0; n < scan.d_state; ++n) {
        into[lane * scan.d_state + n] = values[n * kTile<T> + lane];
      }
    }
  }

  // This tile's part of the states that enter `chunk`, (rows, chunks, d_state, d_inner).
  int64_t saved_at(int64_t chunk, int64_t n) const {
    return ((row * scan.chunks() + chunk) * scan.d_state + n) * scan.d_inner + first;
  }

  // A full tile is copied by a few moves, which the compiler knows the number of.
  void copy(const T* from, T* into) const {
    if (width == kTile<T>) {
      std::copy(from, from + kTile<T>, into);
    } else {
      std::copy(from, from + width, into);
      std::fill(into + width, into + kTile<T>, T(0));
    }
  }

  void copy_out(const V* from, T* into) const {
    const T* values = reinterpret_cast<const T*>(from);
    if (width == kTile<T>) {
      std::copy(values, values + kTile<T>, into);
    } else {
      std::copy(values, values + width, into);
    }
  }
};

// Step sizes of a chunk in place: bias, softplus and its slope if that is wanted.
// Returns the largest size, NaN if there is one.
template <typename T>
T prepare_steps(const Tile<T>& tile, const Lanes<T>* bias, int64_t count, Lanes<T>* dt,
                Lanes<T>* slope) {
  Lanes<T> most{};
  for (int64_t i = 0; i < count * kRegisters; ++i) {
    Lanes<T> step = dt[i] + bias[i % kRegisters];
    if (slope != nullptr) slope[i] = tile.scan.softplus ? sigmoid<T>(step) : all<T>(T(1));
    if (tile.scan.softplus) step = softplus<T>(step);
    dt[i] = step;
    most = larger<T>(most, absolute<T>(step));
  }
  return largest<T>(most);
}

// Whether no exponent of the tile can leave the range of the number type; false if
// anything is NaN.
template <typename T>
bool bounded(T largest_step, T largest_rate) {
  return largest_step * largest_rate < Number<T>::kLargestExponent - 2;
}

template <typename T>
T largest_rate(const Lanes<T>* rates, int64_t count) {
  Lanes<T> most{};
  for (int64_t i = 0; i < count; ++i) most = larger<T>(most, absolute<T>(rates[i]));
  return largest<T>(most);
}

// A tile with its weights at hand. Several tiles of a row go through a chunk one after
// the other before the first goes on to the next chunk: their channels are neighbours in
// memory, and the rows of a chunk, a page apart or more, are looked up once for all.
template <typename T>
struct Weighted {
  using V = Lanes<T>;

  Tile<T> tile;
  V* rates;  // A log2 e
  T rate;    // the largest
  V bias[kRegisters], skip[kRegisters];

  static size_t bytes(const Scan<T>& scan) {
    return scan.d_state * kRegisters * sizeof(V);
  }

  Weighted(const Scan<T>& scan, int64_t row, int64_t index, Scratch& scratch)
      : tile(scan, row, index), rates(scratch.take<V>(scan.d_state * kRegisters)) {
    tile.read_weights(scan.delta_bias, bias);
    tile.read_weights(scan.D, skip);
    tile.read_states(scan.A, tile.group, kLog2e<T>, rates);
    rate = largest_rate<T>(rates, scan.d_state * kRegisters);
  }
};

template <typename T, bool kBounded>
inline Lanes<T> decay(Lanes<T> step, Lanes<T> rate) {
  if constexpr (kBounded) {
    return exp2_of_bounded<T>(step, rate);
  } else {
    return exp2_of_any<T>(step * rate);
  }
}

}  // namespace capibara
