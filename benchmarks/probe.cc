// What this machine can do at best: the arithmetic of the selective scan with all its
// operands in registers, and a copy of a large array. Nothing of the scan is in here but
// its exponential.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "lanes.h"

namespace {

using T = float;
using V = capibara::Lanes<T>;

// Independent chains: enough to hide the latency of an exponential. A fourth would not
// find room in 16 registers, and took longer.
constexpr int kChains = 3;
constexpr int64_t kElements = kChains * capibara::kLanes<T>;

// From here on the compiler knows nothing about `x`, so no work on it can be saved.
inline void hide(V& x) {
#if defined(__x86_64__) || defined(__i386__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

struct Constants {
  T rate, entering, read;
};

// `tokens` tokens of `d_state` states of `kElements` channels. An element costs what it
// costs a scan: h = 2^(step rate) h + step entering, y += read h.
void scan(int64_t tokens, int64_t d_state, const T* steps, Constants constants, T* y) {
  V rate = capibara::all<T>(constants.rate), entering = capibara::all<T>(constants.entering);
  V read = capibara::all<T>(constants.read);
  hide(rate), hide(entering), hide(read);
  V step[kChains], h[kChains] = {}, out[kChains] = {};
  for (int v = 0; v < kChains; ++v) step[v] = capibara::all<T>(steps[v]);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int v = 0; v < kChains; ++v) out[v] = V{};
    for (int64_t n = 0; n < d_state; ++n) {
#pragma GCC unroll 3
      for (int v = 0; v < kChains; ++v) {
        hide(step[v]);
        h[v] = capibara::exp2_of_bounded<T>(step[v], rate) * h[v] + step[v] * entering;
        out[v] += h[v] * read;
      }
    }
    for (int v = 0; v < kChains; ++v) hide(out[v]);
  }
  for (int v = 0; v < kChains; ++v) y[v] = out[v][0];
}

// `body(i)` for every thread, the caller being the last of them.
template <typename Body>
void on_threads(int threads, Body body) {
  std::vector<std::thread> others;
  for (int i = 0; i + 1 < threads; ++i) others.emplace_back(body, i);
  body(threads - 1);
  for (auto& other : others) other.join();
}

}  // namespace

#pragma GCC visibility push(default)

// The arithmetic of at least `elements` (token, channel, state) triples, shared out among
// `threads`. Writes the last output of each chain of each thread, returns how many tokens
// a thread read.
extern "C" int64_t capibara_probe_scan(int64_t elements, int64_t d_state, int threads,
                                       const T* steps, T rate, T entering, T read, T* y) {
  const int64_t token = threads * d_state * kElements;
  const int64_t tokens = (elements + token - 1) / token;
  on_threads(threads, [&](int i) {
    scan(tokens, d_state, steps, {rate, entering, read}, y + i * kChains);
  });
  return tokens;
}

extern "C" void capibara_probe_copy(const char* from, char* to, int64_t bytes,
                                    int threads) {
  const int64_t share = (bytes + threads - 1) / threads;
  on_threads(threads, [&](int i) {
    const int64_t begin = std::min(i * share, bytes);
    std::memcpy(to + begin, from + begin, std::min(share, bytes - begin));
  });
}
