// The scan forward over some tiles of channels of one row.
#pragma once

#include <vector>

#include "cpu_tile.h"

namespace capibara {

template <typename T>
struct ForwardResults {
  T *y, *final_state, *saved;  // `saved` may be null
};

// Read the tokens of a chunk: `states` is moved on, `y` is C h.
template <typename T, bool kBounded>
void advance(const Tile<T>& tile, int64_t token, int64_t count, const Lanes<T>* rates,
             const Lanes<T>* dt, const Lanes<T>* u, Lanes<T>* states, Lanes<T>* y) {
  using V = Lanes<T>;
  const int64_t d_state = tile.scan.d_state;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = tile.row * tile.scan.seq + token + t;
    if (tile.scan.reset != nullptr && tile.scan.reset[at]) {
      std::fill(states, states + d_state * kRegisters, V{});
    }
    const T* B = tile.scan.B + at * d_state;
    const T* C = tile.scan.C + at * d_state;
    V step[kRegisters], entering[kRegisters], out[kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      step[v] = dt[t * kRegisters + v];
      entering[v] = step[v] * u[t * kRegisters + v];
      out[v] = V{};
    }
    for (int64_t n = 0; n < d_state; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int64_t i = n * kRegisters + v;
        states[i] = decay<T, kBounded>(step[v], rates[i]) * states[i] + entering[v] * B[n];
        out[v] += states[i] * C[n];
      }
    }
    for (int v = 0; v < kRegisters; ++v) y[t * kRegisters + v] = out[v];
  }
}

// A tile on its way through the chunks.
template <typename T>
struct ForwardTile : Weighted<T> {
  using V = Lanes<T>;

  V* states;

  static size_t bytes(const Scan<T>& scan) { return 2 * Weighted<T>::bytes(scan); }

  ForwardTile(const Scan<T>& scan, int64_t row, int64_t index, Scratch& scratch)
      : Weighted<T>(scan, row, index, scratch),
        states(scratch.take<V>(scan.d_state * kRegisters)) {
    if (scan.initial_state != nullptr) {
      this->tile.read_states(scan.initial_state, row, T(1), states);
    } else {
      std::fill(states, states + scan.d_state * kRegisters, V{});
    }
  }
};

// What a thread keeps of the streams of the chunk that it walks through.
template <typename T>
struct Streams {
  using V = Lanes<T>;

  V *u, *dt, *z, *y;

  static size_t bytes(const Scan<T>& scan) {
    return 4 * scan.chunk * kRegisters * sizeof(V);
  }

  Streams(const Scan<T>& scan, Scratch& scratch) {
    for (V** buffer : {&u, &dt, &z, &y}) {
      *buffer = scratch.take<V>(scan.chunk * kRegisters);
    }
  }
};

template <typename T>
void forward_chunk(const ForwardTile<T>& at, int64_t chunk, const Streams<T>& streams,
                   const ForwardResults<T>& results) {
  const auto [u, dt, z, y] = streams;
  const Tile<T>& tile = at.tile;
  const Scan<T>& scan = tile.scan;
  const int64_t token = chunk * scan.chunk;
  const int64_t count = std::min(scan.chunk, scan.seq - token);
  if (results.saved != nullptr) {
    for (int64_t n = 0; n < scan.d_state; ++n) {
      tile.copy_out(at.states + n * kRegisters, results.saved + tile.saved_at(chunk, n));
    }
  }
  tile.read(scan.u, token, count, u);
  tile.read(scan.delta, token, count, dt);
  const T step = prepare_steps<T>(tile, at.bias, count, dt, nullptr);
  const auto run = bounded<T>(step, at.rate) ? advance<T, true> : advance<T, false>;
  run(tile, token, count, at.rates, dt, u, at.states, y);
  if (scan.D != nullptr) {
    for (int64_t i = 0; i < count * kRegisters; ++i) y[i] += at.skip[i % kRegisters] * u[i];
  }
  if (scan.z != nullptr) {
    tile.read(scan.z, token, count, z);
    for (int64_t i = 0; i < count * kRegisters; ++i) y[i] *= z[i] * sigmoid<T>(z[i]);
  }
  tile.write(y, token, count, results.y);
}

// Part `part` of `parts` of the tiles of a row.
template <typename T>
void forward_part(const Scan<T>& scan, int64_t row, int64_t part, int64_t parts,
                  const ForwardResults<T>& results) {
  const int64_t first = scan.tiles() * part / parts;
  const int64_t end = scan.tiles() * (part + 1) / parts;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(Streams<T>::bytes(scan) + (end - first) * ForwardTile<T>::bytes(scan));
  const Streams<T> streams(scan, scratch);
  std::vector<ForwardTile<T>> tiles;
  tiles.reserve(end - first);
  for (int64_t i = first; i < end; ++i) tiles.emplace_back(scan, row, i, scratch);
  for (int64_t chunk = 0; chunk < scan.chunks(); ++chunk) {
    for (const auto& tile : tiles) forward_chunk<T>(tile, chunk, streams, results);
  }
  for (const auto& at : tiles) at.tile.write_states(at.states, results.final_state);
}

}  // namespace capibara
