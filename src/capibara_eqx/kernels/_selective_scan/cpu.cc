// The selective scan for XLA on the CPU. `cpu.py` calls it and says what the operands
// are; an operand without elements is an absent one.
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace capibara {
namespace {

namespace ffi = xla::ffi;

template <typename T>
const T* values(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() == 0 ? nullptr
                                     : static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* values(ffi::Result<ffi::AnyBuffer>& buffer) {
  return buffer->element_count() == 0 ? nullptr : static_cast<T*>(buffer->untyped_data());
}

// The operands in the order of `Operands`, whatever their type.
struct Inputs {
  bool softplus;
  int64_t chunk;
  const ffi::AnyBuffer &u, &delta, &A, &B, &C, &D, &z, &delta_bias, &initial_state, &reset;

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

// Below this number of states one thread is done before another has begun.
constexpr int64_t kWorthAThread = 1 << 16;

template <typename T>
void run_tasks(const ffi::ThreadPool& pool, const Scan<T>& scan, int64_t tasks,
               std::function<void(int64_t)> body) {
  const int64_t work = scan.rows * scan.seq * scan.d_inner * (scan.d_state + 1);
  const int64_t threads = std::min(pool.num_threads(), 1 + work / kWorthAThread);
  auto& schedule = const_cast<ffi::ThreadPool&>(pool);
  parallel_for(
      tasks, threads, [&](auto job) { schedule.Schedule(std::move(job)); },
      std::move(body));
}

template <typename T>
void forward(const ffi::ThreadPool& pool, const Inputs& inputs,
             const ForwardResults<T>& results) {
  const Scan<T> scan = inputs.scan<T>();
  const int64_t tiles = scan.tiles();
  run_tasks<T>(pool, scan, scan.rows * tiles, [&](int64_t task) {
    forward_tile<T>(scan, task / tiles, task % tiles, results);
  });
}

template <typename T>
void backward(const ffi::ThreadPool& pool, const Inputs& inputs,
              const Cotangents<T>& cotangents, const BackwardResults<T>& results) {
  const Scan<T> scan = inputs.scan<T>();
  run_tasks<T>(pool, scan, scan.rows * results.parts, [&](int64_t task) {
    backward_part<T>(scan, task / results.parts, task % results.parts, cotangents,
                     results);
  });
}

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error forward_handler(ffi::ThreadPool pool, bool softplus, int64_t chunk, Buffer u,
                           Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D, Buffer z,
                           Buffer delta_bias, Buffer initial_state, Buffer reset, Result y,
                           Result final_state, Result saved) {
  const Inputs inputs{softplus, chunk, u, delta, A,   B, C,
                      D,        z,     delta_bias, initial_state, reset};
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
