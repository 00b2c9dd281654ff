// The products of product.h as XLA's custom calls, on XLA's threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace integer_linear;

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 17;  // bytes of codes: 10 microseconds' reading, as long as waking a thread takes

// f(0) .. f(count - 1), by this thread and those of the pool that come to it. A task that a busy pool begins too late finds
// nothing left, and touches nothing but the counters.
template <typename F>
void in_parallel(ffi::ThreadPool& pool, int64_t count, int64_t bytes, const F& f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &f] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count; shared->done.fetch_add(1)) f(i);
  };
  int64_t threads = std::min({pool.num_threads(), count, bytes / WORTH_A_THREAD + 1});
  for (int64_t i = 1; i < threads; i++) pool.Schedule(decltype(work)(work));
  work();
  while (shared->done.load() < count) std::this_thread::yield();
}

// A range of outputs cut into whole blocks, several for each thread, since threads do not run equally fast.
struct Ranges {
  int64_t outputs, size, count;
  Ranges(int64_t outputs, int64_t threads) : outputs(outputs) {
    size = std::max<int64_t>((outputs / (4 * std::max<int64_t>(threads, 1)) + BLOCK - 1) / BLOCK, 1) * BLOCK;
    count = (outputs + size - 1) / size;
  }
  int64_t first(int64_t i) const { return i * size; }
  int64_t last(int64_t i) const { return std::min(outputs, (i + 1) * size); }
};

// The matrices of an IntegerWeight [E, inputs, outputs].
struct Matrices {
  const uint8_t* codes;
  const uint16_t* scale;
  const uint8_t* zero;
  int64_t inputs, outputs, groups, bits;

  Matrices(const ffi::Buffer<ffi::U8>& codes, const ffi::Buffer<ffi::F16>& scale, const ffi::Buffer<ffi::U8>& zero,
           int64_t experts, int64_t inputs, int64_t bits)
      : codes(codes.typed_data()), scale(scale.typed_data()), zero(zero.element_count() ? zero.typed_data() : nullptr),
        inputs(inputs), outputs(codes.element_count() * 8 / bits / inputs / experts),
        groups(scale.element_count() / outputs / experts), bits(bits) {}

  int64_t bytes() const { return inputs * outputs * bits / 8; }

  void multiply(int64_t expert, const float* x, int64_t T, int64_t first, int64_t last, float* y) const {
    const int64_t at = expert * groups * outputs;
    Matrix w{codes + expert * bytes(), scale + at, zero ? zero + at : nullptr, inputs, outputs, inputs / groups};
    if (bits == 2) product<2>(x, T, w, first, last, y);
    if (bits == 4) product<4>(x, T, w, first, last, y);
    if (bits == 8) product<8>(x, T, w, first, last, y);
  }
};

// y[T, N] = x[T, K] w.
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F16> scale,
                  ffi::Buffer<ffi::U8> zero, ffi::ResultBuffer<ffi::F32> y, int64_t bits) {
  const int64_t T = x.dimensions()[0], K = x.dimensions()[1];
  Matrices w(codes, scale, zero, 1, K, bits);
  Ranges ranges(w.outputs, pool.num_threads());
  in_parallel(pool, ranges.count, w.bytes(), [&](int64_t i) {
    w.multiply(0, x.typed_data(), T, ranges.first(i), ranges.last(i), y->typed_data());
  });
  return ffi::Error::Success();
}

// y[T, D] = sum_k weight[T, K] swiglu of expert[T, K]; slots (token, choice) are sorted by expert, whose weights are read once.
ffi::Error Experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> gate_up_codes,
                   ffi::Buffer<ffi::F16> gate_up_scale, ffi::Buffer<ffi::U8> gate_up_zero, ffi::Buffer<ffi::U8> down_codes,
                   ffi::Buffer<ffi::F16> down_scale, ffi::Buffer<ffi::U8> down_zero, ffi::Buffer<ffi::S32> expert,
                   ffi::Buffer<ffi::F32> weight, ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t down_bits) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], choices = expert.dimensions()[1];
  const int64_t E = gate_up_codes.dimensions()[0];
  const int64_t M = down_codes.dimensions()[1] * 8 / down_bits;
  Matrices gate_up(gate_up_codes, gate_up_scale, gate_up_zero, E, D, bits);
  Matrices down(down_codes, down_scale, down_zero, E, M, down_bits);
  const int32_t* chosen = expert.typed_data();

  std::vector<int64_t> slots;
  for (int64_t s = 0; s < T * choices; s++)
    if (chosen[s] >= 0 && chosen[s] < E) slots.push_back(s);
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
  const int64_t S = slots.size();
  std::vector<int64_t> begins;  // of each expert's slots
  for (int64_t i = 0; i < S; i++)
    if (i == 0 || chosen[slots[i]] != chosen[slots[i - 1]]) begins.push_back(i);
  const int64_t groups = begins.size();
  begins.push_back(S);
  auto expert_of = [&](int64_t g) { return int64_t(chosen[slots[begins[g]]]); };

  std::vector<float> rows(S * D), gate_ups(S * 2 * M), h(S * M), down_rows(S * D);
  for (int64_t i = 0; i < S; i++) std::copy_n(x.typed_data() + slots[i] / choices * D, D, rows.data() + i * D);

  Ranges hidden(M, pool.num_threads());
  in_parallel(pool, groups * hidden.count, groups * gate_up.bytes(), [&](int64_t i) {
    const int64_t g = i / hidden.count, first = hidden.first(i % hidden.count), last = hidden.last(i % hidden.count);
    const int64_t from = begins[g], count = begins[g + 1] - from;
    float* out = gate_ups.data() + from * 2 * M;
    gate_up.multiply(expert_of(g), rows.data() + from * D, count, first, last, out);
    gate_up.multiply(expert_of(g), rows.data() + from * D, count, M + first, M + last, out);
    for (int64_t r = from; r < from + count; r++)
      for (int64_t m = first; m < last; m++) {
        const float gate = gate_ups[r * 2 * M + m], up = gate_ups[r * 2 * M + M + m];
        h[r * M + m] = gate / (1 + std::exp(-gate)) * up * weight.typed_data()[slots[r]];
      }
  });

  Ranges outputs(D, pool.num_threads());
  in_parallel(pool, outputs.count, groups * down.bytes(), [&](int64_t i) {
    const int64_t first = outputs.first(i), last = outputs.last(i);
    for (int64_t t = 0; t < T; t++) std::fill(y->typed_data() + t * D + first, y->typed_data() + t * D + last, 0.f);
    for (int64_t g = 0; g < groups; g++)
      down.multiply(expert_of(g), h.data() + begins[g] * M, begins[g + 1] - begins[g], first, last,
                    down_rows.data() + begins[g] * D);
    for (int64_t r = 0; r < S; r++) {
      float* out = y->typed_data() + slots[r] / choices * D;
      for (int64_t d = first; d < last; d++) out[d] += down_rows[r * D + d];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("down_bits"));
