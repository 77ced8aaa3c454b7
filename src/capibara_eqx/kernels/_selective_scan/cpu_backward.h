// The scan backward over one tile of channels of one row: chunk by chunk from the last
// to the first, the states of a chunk are computed again from the one that entered it.
#pragma once

#include "cpu_tile.h"

namespace capibara {

template <typename T>
struct Cotangents {
  const T *saved, *y, *final_state;
};

// One entry a row for what belongs to the weights. `B` and `C` are the sums over the
// channels of one part, (rows, parts, seq, d_state); absent ones are null.
template <typename T>
struct BackwardResults {
  int64_t parts;
  T *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state;
};

// What a thread keeps of the chunk that it walks through.
template <typename T>
struct Chunk {
  using V = Lanes<T>;

  int64_t token = 0, count = 0;
  V *u, *dt, *slope, *z, *dy, *y, *du, *ddelta;
  V* decays;   // of every token
  V* states;   // before every token, and after the last
  V* nothing;  // what a token finds that is reset

  static size_t bytes(const Scan<T>& scan) {
    const int64_t stream = scan.chunk * kRegisters;
    return (8 * stream + (2 * stream + 2 * kRegisters) * scan.d_state) * sizeof(V);
  }

  Chunk(const Scan<T>& scan, Scratch& scratch) {
    const int64_t stream = scan.chunk * kRegisters;
    for (V** buffer : {&u, &dt, &slope, &z, &dy, &y, &du, &ddelta}) {
      *buffer = scratch.take<V>(stream);
    }
    decays = scratch.take<V>(stream * scan.d_state);
    states = scratch.take<V>((stream + kRegisters) * scan.d_state);
    nothing = scratch.take<V>(kRegisters * scan.d_state);
    std::fill(nothing, nothing + kRegisters * scan.d_state, V{});
  }

  const V* before(const Scan<T>& scan, int64_t row, int64_t t) const {
    const bool reset = scan.reset != nullptr && scan.reset[row * scan.seq + token + t];
    return reset ? nothing : states + t * scan.d_state * kRegisters;
  }
};

// The states of a chunk, from those that enter it; `y` is C h.
template <typename T, bool kBounded>
void refill(const Tile<T>& tile, const Lanes<T>* rates, const Chunk<T>& chunk) {
  using V = Lanes<T>;
  const int64_t d_state = tile.scan.d_state, size = d_state * kRegisters;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t at = tile.row * tile.scan.seq + chunk.token + t;
    const T* B = tile.scan.B + at * d_state;
    const T* C = tile.scan.C + at * d_state;
    const V* before = chunk.before(tile.scan, tile.row, t);
    V* after = chunk.states + (t + 1) * size;
    V* decays = chunk.decays + t * size;
    V step[kRegisters], entering[kRegisters], out[kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      step[v] = chunk.dt[t * kRegisters + v];
      entering[v] = step[v] * chunk.u[t * kRegisters + v];
      out[v] = V{};
    }
    for (int64_t n = 0; n < d_state; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int64_t i = n * kRegisters + v;
        decays[i] = decay<T, kBounded>(step[v], rates[i]);
        after[i] = decays[i] * before[i] + entering[v] * B[n];
        out[v] += after[i] * C[n];
      }
    }
    for (int v = 0; v < kRegisters; ++v) chunk.y[t * kRegisters + v] = out[v];
  }
}

// Sums over the tokens that have been walked through, and the cotangent of the state.
template <typename T>
struct Walk {
  using V = Lanes<T>;

  V *carry, *dA;
  V dD[kRegisters] = {}, dbias[kRegisters] = {};

  static size_t bytes(const Scan<T>& scan) {
    return 2 * scan.d_state * kRegisters * sizeof(V);
  }

  Walk(const Scan<T>& scan, Scratch& scratch) {
    carry = scratch.take<V>(scan.d_state * kRegisters);
    dA = scratch.take<V>(scan.d_state * kRegisters);
    std::fill(dA, dA + scan.d_state * kRegisters, V{});
  }
};

// Walk back through a chunk. With l_t the cotangent of the state after token t,
//   l_t = C_t dy_t + a_(t+1) l_(t+1),  dB_t += l_t dt u,  dC_t += dy_t h_t,
//   da_t = l_t h_(t-1),  dA += dt a_t da_t,  du and ddt from the rest.
// `rates` is A log2 e, hence the factor ln 2 at the end.
template <typename T>
void walk_back(const Tile<T>& tile, const Lanes<T>* rates, const Chunk<T>& chunk, T* dB,
               T* dC, Walk<T>& walk) {
  using V = Lanes<T>;
  const int64_t d_state = tile.scan.d_state, size = d_state * kRegisters;
  for (int64_t t = chunk.count - 1; t >= 0; --t) {
    const int64_t at = tile.row * tile.scan.seq + chunk.token + t;
    const T* B = tile.scan.B + at * d_state;
    const T* C = tile.scan.C + at * d_state;
    const V* before = chunk.before(tile.scan, tile.row, t);
    const V* after = chunk.states + (t + 1) * size;
    const V* decays = chunk.decays + t * size;
    V step[kRegisters], entering[kRegisters], dy[kRegisters];
    V through_B[kRegisters] = {}, through_decay[kRegisters] = {};
    for (int v = 0; v < kRegisters; ++v) {
      step[v] = chunk.dt[t * kRegisters + v];
      entering[v] = step[v] * chunk.u[t * kRegisters + v];
      dy[v] = chunk.dy[t * kRegisters + v];
    }
    for (int64_t n = 0; n < d_state; ++n) {
      V sum_B{}, sum_C{};
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int64_t i = n * kRegisters + v;
        const V cotangent = walk.carry[i] + dy[v] * C[n];
        sum_B += cotangent * entering[v];
        sum_C += dy[v] * after[i];
        through_B[v] += cotangent * B[n];
        const V decayed = cotangent * decays[i];
        const V of_exponent = decayed * before[i];
        through_decay[v] += of_exponent * rates[i];
        walk.dA[i] += of_exponent * step[v];
        walk.carry[i] = decayed;
      }
      dB[(chunk.token + t) * d_state + n] += sum<T>(sum_B);
      dC[(chunk.token + t) * d_state + n] += sum<T>(sum_C);
    }
    if (before == chunk.nothing) std::fill(walk.carry, walk.carry + size, V{});
    for (int v = 0; v < kRegisters; ++v) {
      const int64_t i = t * kRegisters + v;
      chunk.du[i] = step[v] * through_B[v];
      chunk.ddelta[i] = chunk.u[i] * through_B[v] + through_decay[v] * kLn2<T>;
    }
  }
}

// Cotangents of the gate, `dy` before it, from those after it.
template <typename T>
void through_gate(const Tile<T>& tile, const Lanes<T>* skip, const Chunk<T>& chunk,
                  const BackwardResults<T>& results) {
  tile.read(tile.scan.z, chunk.token, chunk.count, chunk.z);
  for (int64_t i = 0; i < chunk.count * kRegisters; ++i) {
    const Lanes<T> z = chunk.z[i], open = sigmoid<T>(z), gate = z * open;
    const Lanes<T> y = chunk.y[i] + skip[i % kRegisters] * chunk.u[i];
    chunk.z[i] = chunk.dy[i] * y * (open + gate * (T(1) - open));
    chunk.dy[i] *= gate;
  }
  tile.write(chunk.z, chunk.token, chunk.count, results.z);
}

// One chunk, whose first states are already in `chunk.states`.
template <typename T>
void chunk_back(const Tile<T>& tile, const Lanes<T>* rates, T rate, const Lanes<T>* bias,
                const Lanes<T>* skip, const Chunk<T>& chunk, const T* dy, T* dB, T* dC,
                Walk<T>& walk, const BackwardResults<T>& results) {
  const Scan<T>& scan = tile.scan;
  tile.read(scan.u, chunk.token, chunk.count, chunk.u);
  tile.read(scan.delta, chunk.token, chunk.count, chunk.dt);
  tile.read(dy, chunk.token, chunk.count, chunk.dy);
  const T step = prepare_steps<T>(tile, bias, chunk.count, chunk.dt, chunk.slope);
  if (bounded<T>(step, rate)) {
    refill<T, true>(tile, rates, chunk);
  } else {
    refill<T, false>(tile, rates, chunk);
  }
  if (scan.z != nullptr) through_gate<T>(tile, skip, chunk, results);
  walk_back<T>(tile, rates, chunk, dB, dC, walk);
  for (int64_t i = 0; i < chunk.count * kRegisters; ++i) {
    const int v = i % kRegisters;
    chunk.du[i] += skip[v] * chunk.dy[i];
    chunk.ddelta[i] *= chunk.slope[i];
    walk.dD[v] += chunk.dy[i] * chunk.u[i];
    walk.dbias[v] += chunk.ddelta[i];
  }
  tile.write(chunk.du, chunk.token, chunk.count, results.u);
  tile.write(chunk.ddelta, chunk.token, chunk.count, results.delta);
}

template <typename T>
void backward_tile(const Scan<T>& scan, int64_t row, int64_t index,
                   const Cotangents<T>& cotangents, T* dB, T* dC,
                   const BackwardResults<T>& results) {
  using V = Lanes<T>;
  const Tile<T> tile(scan, row, index);
  const int64_t size = scan.d_state * kRegisters;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(size * sizeof(V) + Chunk<T>::bytes(scan) + Walk<T>::bytes(scan));
  V* rates = scratch.take<V>(size);
  Chunk<T> chunk(scan, scratch);
  Walk<T> walk(scan, scratch);

  V bias[kRegisters], skip[kRegisters];
  tile.read_weights(scan.delta_bias, bias);
  tile.read_weights(scan.D, skip);
  tile.read_states(scan.A, tile.group, kLog2e<T>, rates);
  const T rate = largest_rate<T>(rates, size);
  tile.read_states(cotangents.final_state, row, T(1), walk.carry);

  for (int64_t at = scan.chunks() - 1; at >= 0; --at) {
    chunk.token = at * scan.chunk;
    chunk.count = std::min(scan.chunk, scan.seq - chunk.token);
    for (int64_t n = 0; n < scan.d_state; ++n) {
      T* into = reinterpret_cast<T*>(chunk.states + n * kRegisters);
      tile.copy(cotangents.saved + tile.saved_at(at, n), into);
    }
    chunk_back<T>(tile, rates, rate, bias, skip, chunk, cotangents.y, dB, dC, walk,
                  results);
  }

  tile.write_states(walk.dA, results.A);
  if (results.D != nullptr) tile.write_row(walk.dD, results.D);
  if (results.delta_bias != nullptr) tile.write_row(walk.dbias, results.delta_bias);
  if (results.initial_state != nullptr) {
    tile.write_states(walk.carry, results.initial_state);
  }
}

// A part is a run of neighbouring tiles of one row, whose sums over channels are taken
// in order: the result does not depend on which thread does what.
template <typename T>
void backward_part(const Scan<T>& scan, int64_t row, int64_t part,
                   const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const int64_t size = scan.seq * scan.d_state;
  T* dB = results.B + (row * results.parts + part) * size;
  T* dC = results.C + (row * results.parts + part) * size;
  std::fill(dB, dB + size, T(0));
  std::fill(dC, dC + size, T(0));
  const int64_t tiles = scan.tiles();
  for (int64_t tile = tiles * part / results.parts;
       tile < tiles * (part + 1) / results.parts; ++tile) {
    backward_tile<T>(scan, row, tile, cotangents, dB, dC, results);
  }
}

}  // namespace capibara
