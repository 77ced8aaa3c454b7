// The scan forward over one tile of channels of one row.
#pragma once

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

template <typename T>
void forward_tile(const Scan<T>& scan, int64_t row, int64_t index,
                  const ForwardResults<T>& results) {
  using V = Lanes<T>;
  const Tile<T> tile(scan, row, index);
  const int64_t states_size = scan.d_state * kRegisters;
  const int64_t chunk_size = scan.chunk * kRegisters;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve((2 * states_size + 4 * chunk_size) * sizeof(V));
  V* rates = scratch.take<V>(states_size);
  V* states = scratch.take<V>(states_size);
  V* u = scratch.take<V>(chunk_size);
  V* dt = scratch.take<V>(chunk_size);
  V* z = scratch.take<V>(chunk_size);
  V* y = scratch.take<V>(chunk_size);

  V bias[kRegisters], skip[kRegisters];
  tile.read_weights(scan.delta_bias, bias);
  tile.read_weights(scan.D, skip);
  tile.read_states(scan.A, tile.group, kLog2e<T>, rates);
  const T rate = largest_rate<T>(rates, states_size);
  if (scan.initial_state != nullptr) {
    tile.read_states(scan.initial_state, row, T(1), states);
  } else {
    std::fill(states, states + states_size, V{});
  }

  for (int64_t chunk = 0; chunk < scan.chunks(); ++chunk) {
    const int64_t token = chunk * scan.chunk;
    const int64_t count = std::min(scan.chunk, scan.seq - token);
    if (results.saved != nullptr) {
      for (int64_t n = 0; n < scan.d_state; ++n) {
        tile.copy_out(states + n * kRegisters, results.saved + tile.saved_at(chunk, n));
      }
    }
    tile.read(scan.u, token, count, u);
    tile.read(scan.delta, token, count, dt);
    const T step = prepare_steps<T>(tile, bias, count, dt, nullptr);
    const auto run = bounded<T>(step, rate) ? advance<T, true> : advance<T, false>;
    run(tile, token, count, rates, dt, u, states, y);
    if (scan.D != nullptr) {
      for (int64_t i = 0; i < count * kRegisters; ++i) y[i] += skip[i % kRegisters] * u[i];
    }
    if (scan.z != nullptr) {
      tile.read(scan.z, token, count, z);
      for (int64_t i = 0; i < count * kRegisters; ++i) y[i] *= z[i] * sigmoid<T>(z[i]);
    }
    tile.write(y, token, count, results.y);
  }
  tile.write_states(states, results.final_state);
}

}  // namespace capibara
