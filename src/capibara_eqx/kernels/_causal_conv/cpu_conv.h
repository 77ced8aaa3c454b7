// The depthwise causal convolution, forward and backward, with SiLU after it if wanted.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "scratch.h"

namespace capibara {

// A task takes a few neighbouring channels of one row, and of its tokens either a run
// (forward) or a part (backward), the part a few tokens at a time.
constexpr int64_t kChannels = 256;
constexpr int64_t kRun = 64;

// The operands; what is absent is null. `weight` is (groups, width, channels).
template <typename T>
struct Conv {
  int64_t rows, groups, seq, channels, width, dilation;
  bool silu;
  const T *x, *weight, *bias, *history;
  const int32_t* document;

  int64_t reach() const { return (width - 1) * dilation; }
  int64_t blocks() const { return (channels + kChannels - 1) / kChannels; }
};

// The channels of one task, and what belongs to them.
template <typename T>
struct Strip {
  const Conv<T>& conv;
  const int64_t row, first, count;
  const T *weight, *bias;

  Strip(const Conv<T>& conv, int64_t row, int64_t block)
      : conv(conv),
        row(row),
        first(block * kChannels),
        count(std::min(kChannels, conv.channels - first)) {
    const int64_t group = row / (conv.rows / conv.groups);
    weight = conv.weight + group * conv.width * conv.channels + first;
    bias = conv.bias == nullptr ? nullptr : conv.bias + group * conv.channels + first;
  }

  // The row of `tokens`, (rows, seq, channels).
  template <typename P>
  P* at(P* tokens, int64_t token) const {
    return tokens + (row * conv.seq + token) * conv.channels + first;
  }

  // The input that tap `k` sees from `token`; null if it is of another document.
  const T* input(int64_t token, int64_t k) const {
    const int64_t reach = conv.reach(), seen = token + k * conv.dilation;
    if (conv.document != nullptr) {
      const int32_t* documents = conv.document + row * (reach + conv.seq);
      if (documents[seen] != documents[reach + token]) return nullptr;
    }
    if (seen >= reach) return at(conv.x, seen - reach);
    return conv.history + (row * reach + seen) * conv.channels + first;
  }
};

// For each register of channels: `body(offset, how many of it there are)`.
template <typename T, typename Body>
inline void each_register(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) body(c, int64_t{kLanes<T>});
  if (c < channels) body(c, channels - c);
}

// An input that a token sees, and the weights that it is seen through.
template <typename T>
struct Tap {
  const T *x, *weight;
};

// The convolution at one token before any activation: `use(offset, count, values)` for
// each register of channels. `taps` has room for one a weight.
template <typename T, typename Use>
inline void convolve(const Strip<T>& strip, int64_t token, Tap<T>* taps, Use use) {
  int64_t seen = 0;
  for (int64_t k = 0; k < strip.conv.width; ++k) {
    const T* x = strip.input(token, k);
    if (x != nullptr) taps[seen++] = {x, strip.weight + k * strip.conv.channels};
  }
  each_register<T>(strip.count, [&](int64_t c, int64_t n) {
    Lanes<T> sum = strip.bias == nullptr ? Lanes<T>{} : load_some(strip.bias + c, n);
    for (int64_t i = 0; i < seen; ++i) {
      sum += load_some(taps[i].weight + c, n) * load_some(taps[i].x + c, n);
    }
    use(c, n, sum);
  });
}

template <typename T>
void forward_run(const Conv<T>& conv, int64_t row, int64_t block, int64_t run, T* y) {
  const Strip<T> strip(conv, row, block);
  Scratch& scratch = Scratch::of_this_thread();
  scratch.reserve(conv.width * sizeof(Tap<T>));
  Tap<T>* taps = scratch.take<Tap<T>>(conv.width);
  const int64_t end = std::min(conv.seq, (run + 1) * kRun);
  for (int64_t token = run * kRun; token < end; ++token) {
    T* out = strip.at(y, token);
    convolve(strip, token, taps, [&](int64_t c, int64_t n, Lanes<T> sum) {
      store_some(out + c, conv.silu ? sum * sigmoid<T>(sum) : sum, n);
    });
  }
}

// One entry a row, and for the weights one a part as well: (rows, parts, width + 1,
// channels), the last of them that of the bias.
template <typename T>
struct ConvResults {
  int64_t parts;
  T *x, *weights, *history;
};

// Cotangents before the activation, of `count` tokens.
template <typename T>
void through_activation(const Strip<T>& strip, int64_t token, int64_t count, const T* dy,
                        Tap<T>* taps, T* before) {
  for (int64_t t = 0; t < count; ++t) {
    T* to = before + t * kChannels;
    const T* from = strip.at(dy, token + t);
    if (!strip.conv.silu) {
      std::copy(from, from + strip.count, to);
      continue;
    }
    convolve(strip, token + t, taps, [&](int64_t c, int64_t n, Lanes<T> sum) {
      const Lanes<T> open = sigmoid<T>(sum);
      const Lanes<T> slope = open + sum * open * (T(1) - open);
      store_some(to + c, load_some(from + c, n) * slope, n);
    });
  }
}

template <typename T>
inline void add_product(int64_t channels, const T* a, const T* b, T* to) {
  each_register<T>(channels, [&](int64_t c, int64_t n) {
    store_some(to + c, load_some(to + c, n) + load_some(a + c, n) * load_some(b + c, n), n);
  });
}

// Cotangent of the input at `place`, counted from the start of the history: from the
// tokens that see it, whose cotangents `before` begin with that of token `begin`.
template <typename T>
void backward_input(const Strip<T>& strip, int64_t place, int64_t begin, int64_t end,
                    const T* before, T* dx) {
  std::fill(dx, dx + strip.count, T(0));
  for (int64_t k = 0; k < strip.conv.width; ++k) {
    const int64_t token = place - k * strip.conv.dilation;
    if (token < begin || token >= end || strip.input(token, k) == nullptr) continue;
    add_product(strip.count, strip.weight + k * strip.conv.channels,
                before + (token - begin) * kChannels, dx);
  }
}

// A few tokens of a part: their inputs' cotangents, and what they add to the weights'.
// The outputs that see these inputs reach beyond them, and are computed there too.
template <typename T>
void backward_run(const Strip<T>& strip, int64_t begin, int64_t end, const T* dy,
                  Tap<T>* taps, T* before, T* weights,
                  const ConvResults<T>& results) {
  const Conv<T>& conv = strip.conv;
  const int64_t reach = conv.reach(), seen = std::min(conv.seq, end + reach);
  through_activation(strip, begin, seen - begin, dy, taps, before);
  for (int64_t token = begin; token < end; ++token) {
    backward_input(strip, reach + token, begin, seen, before, strip.at(results.x, token));
    const T* own = before + (token - begin) * kChannels;
    for (int64_t k = 0; k < conv.width; ++k) {
      const T* x = strip.input(token, k);
      if (x != nullptr) add_product(strip.count, own, x, weights + k * conv.channels);
    }
    T* bias = weights + conv.width * conv.channels;
    each_register<T>(strip.count, [&](int64_t c, int64_t n) {
      store_some(bias + c, load_some(bias + c, n) + load_some(own + c, n), n);
    });
  }
  if (begin > 0) return;
  for (int64_t place = 0; place < reach; ++place) {
    backward_input(strip, place, begin, seen, before,
                   results.history + (strip.row * reach + place) * conv.channels + strip.first);
  }
}

template <typename T>
void backward_part(const Conv<T>& conv, int64_t row, int64_t block, int64_t part,
                   const T* dy, const ConvResults<T>& results) {
  const Strip<T> strip(conv, row, block);
  Scratch& scratch = Scratch::of_this_thread();
  const int64_t room = (kRun + conv.reach()) * kChannels;
  scratch.reserve(room * sizeof(T) + conv.width * sizeof(Tap<T>));
  T* before = scratch.take<T>(room);
  Tap<T>* taps = scratch.take<Tap<T>>(conv.width);
  T* weights = results.weights +
               (row * results.parts + part) * (conv.width + 1) * conv.channels + strip.first;
  for (int64_t k = 0; k <= conv.width; ++k) {
    T* sums = weights + k * conv.channels;
    std::fill(sums, sums + strip.count, T(0));
  }
  const int64_t end = conv.seq * (part + 1) / results.parts;
  for (int64_t token = conv.seq * part / results.parts; token < end; token += kRun) {
    backward_run(strip, token, std::min(end, token + kRun), dy, taps, before, weights,
                 results);
  }
}

}  // namespace capibara
