// The selective scan for XLA on the CPU. `cpu.py` calls it and says what the operands
// are; an operand without elements is an absent one.
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_step.h"
#include "xla_call.h"

namespace capibara {
namespace {

namespace ffi = xla::ffi;

// The operands in the order of `Operands`, whatever their type.
struct Inputs {
  bool softplus;
  int64_t chunk;
  const Buffer &u, &delta, &A, &B, &C, &D, &z, &delta_bias, &initial_state, &reset;

  template <typename T>
  Scan<T> scan() const {
    const auto sizes = u.dimensions();
    return {sizes[0],
            A.dimensions()[0],
            sizes[1],
            sizes[2],
            A.dimensions()[2],
            chunk,
            softplus,
            values<T>(u),
            values<T>(delta),
            values<T>(A),
            values<T>(B),
            values<T>(C),
            values<T>(D),
            values<T>(z),
            values<T>(delta_bias),
            values<T>(initial_state),
            values<bool>(reset)};
  }
};

template <typename T>
int64_t work(const Scan<T>& scan) {
  return scan.rows * scan.seq * scan.d_inner * (scan.d_state + 1);
}

// Tiles that go through the chunks together: the more, the fewer pages are looked up. So
// many that what they keep, some KiB each, lies in the second-level cache beside a chunk.
constexpr int64_t kTogether = 8;

template <typename T>
void forward(ffi::ThreadPool& pool, const Inputs& inputs,
             const ForwardResults<T>& results) {
  const Scan<T> scan = inputs.scan<T>();
  const int64_t tiles = scan.tiles();
  if (scan.seq == 1 && results.saved == nullptr) {
    run_tasks(pool, scan.rows * tiles, work(scan), [&](int64_t task) {
      step_tile<T>(scan, task / tiles, task % tiles, results);
    });
    return;
  }
  // Two tasks a thread, lest all wait for the last one.
  const int64_t wanted = 2 * pool.num_threads() / std::max<int64_t>(scan.rows, 1);
  const int64_t fewest = (tiles + kTogether - 1) / kTogether;
  const int64_t parts = std::clamp(wanted, fewest, tiles);
  run_tasks(pool, scan.rows * parts, work(scan), [&](int64_t task) {
    forward_part<T>(scan, task / parts, task % parts, parts, results);
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Inputs& inputs,
              const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const Scan<T> scan = inputs.scan<T>();
  run_tasks(pool, scan.rows * results.parts, work(scan), [&](int64_t task) {
    backward_part<T>(scan, task / results.parts, task % results.parts, cotangents,
                     results);
  });
}

ffi::Error forward_handler(ffi::ThreadPool pool, bool softplus, int64_t chunk, Buffer u,
                           Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D, Buffer z,
                           Buffer delta_bias, Buffer initial_state, Buffer reset, Result y,
                           Result final_state, Result saved) {
  const Inputs inputs{softplus, chunk, u, delta, A,   B, C,
                      D,        z,     delta_bias, initial_state, reset};
  for (Result* result : {&y, &saved}) expect_many_writes(*result);
  if (u.element_type() == ffi::F64) {
    forward<double>(pool, inputs,
                    {values<double>(y), values<double>(final_state), values<double>(saved)});
  } else {
    forward<float>(pool, inputs,
                   {values<float>(y), values<float>(final_state), values<float>(saved)});
  }
  return ffi::Error::Success();
}

ffi::Error backward_handler(ffi::ThreadPool pool, bool softplus, int64_t chunk, Buffer u,
                            Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D, Buffer z,
                            Buffer delta_bias, Buffer initial_state, Buffer reset,
                            Buffer saved, Buffer dy, Buffer dfinal, Result du,
                            Result ddelta, Result dA, Result dB, Result dC, Result dD,
                            Result dz, Result ddelta_bias, Result dinitial) {
  const Inputs inputs{softplus, chunk, u, delta, A,   B, C,
                      D,        z,     delta_bias, initial_state, reset};
  for (Result* result : {&du, &ddelta, &dB, &dC, &dz}) expect_many_writes(*result);
  const auto run = [&](auto number) {
    using T = decltype(number);
    backward<T>(pool, inputs, {values<T>(saved), values<T>(dy), values<T>(dfinal)},
                {dB->dimensions()[1], values<T>(du), values<T>(ddelta), values<T>(dA),
                 values<T>(dB), values<T>(dC), values<T>(dD), values<T>(dz),
                 values<T>(ddelta_bias), values<T>(dinitial)});
  };
  u.element_type() == ffi::F64 ? run(0.0) : run(0.0f);
  return ffi::Error::Success();
}

#define CAPIBARA_OPERANDS          \
  ffi::Ffi::Bind()                 \
      .Ctx<ffi::ThreadPool>()      \
      .Attr<bool>("softplus")      \
      .Attr<int64_t>("chunk")      \
      .Arg<Buffer>() /* u */       \
      .Arg<Buffer>() /* delta */   \
      .Arg<Buffer>() /* A */       \
      .Arg<Buffer>() /* B */       \
      .Arg<Buffer>() /* C */       \
      .Arg<Buffer>() /* D */       \
      .Arg<Buffer>() /* z */       \
      .Arg<Buffer>() /* bias */    \
      .Arg<Buffer>() /* initial */ \
      .Arg<Buffer>() /* reset */

}  // namespace
}  // namespace capibara

// All else is hidden, lest it be mistaken for a name of jaxlib's.
#pragma GCC visibility push(default)

using namespace capibara;

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_selective_scan_forward, forward_handler,
                              CAPIBARA_OPERANDS.Ret<Buffer>()   // y
                                  .Ret<Buffer>()                // final_state
                                  .Ret<Buffer>());              // saved

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_selective_scan_backward, backward_handler,
                              CAPIBARA_OPERANDS.Arg<Buffer>()  // saved
                                  .Arg<Buffer>()               // dy
                                  .Arg<Buffer>()               // dfinal_state
                                  .Ret<Buffer>()               // du
                                  .Ret<Buffer>()               // ddelta
                                  .Ret<Buffer>()               // dA
                                  .Ret<Buffer>()               // dB
                                  .Ret<Buffer>()               // dC
                                  .Ret<Buffer>()               // dD
                                  .Ret<Buffer>()               // dz
                                  .Ret<Buffer>()               // ddelta_bias
                                  .Ret<Buffer>());             // dinitial_state

#pragma GCC visibility pop
