// Products of a few rows of float activations with a matrix of integer codes, as IntegerWeight stores it:
// y[t, n] = sum_k x[t, k] * scale[k / group, n] * (code[k, n] - zero[k / group, n]).
//
// Codes are unsigned, 8 / bits of consecutive inputs k to a byte, low bits first; outputs n are contiguous. Weights are read
// once, in place, for up to ROWS rows, which is what decoding waits for. For every group the sum runs over codes as they are,
// and the zero point comes off at its end: sum x (code - zero) = sum x code - zero sum x.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace integer_linear {

constexpr int BLOCK = 64;  // outputs whose sums are in registers: a cache line of codes

struct Matrix {  // the arrays of an IntegerWeight without leading axes
  const uint8_t* codes;
  const uint16_t* scale;  // float16
  const uint8_t* zero;    // nullptr: 2^(bits-1) everywhere
  int64_t inputs, outputs, group;
};

// A vector of outputs: sums, and the codes of one byte each that a shift of `raw` brings down.
#if defined(__AVX512F__)
struct Vector {
  static constexpr int LANES = 16;
  __m512 v;
  static Vector zeros() { return {_mm512_setzero_ps()}; }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Vector halves(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static __m512i raw(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static Vector bytes(const uint8_t* p) { return {_mm512_cvtepi32_ps(raw(p))}; }
  template <int BITS>
  static Vector code(__m512i raw, int shift) {  // a lookup, which takes the lowest 4 bits only, in place of mask and conversion
    if constexpr (BITS == 8) return {_mm512_cvtepi32_ps(raw)};
    constexpr int m = (1 << BITS) - 1;
    const __m512 table = _mm512_setr_ps(0, 1 & m, 2 & m, 3 & m, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m, 11 & m, 12 & m,
                                        13 & m, 14 & m, 15 & m);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(raw, shift), table)};
  }
  void add(float a) { v = _mm512_add_ps(v, _mm512_set1_ps(a)); }
  void add(Vector a, float b) { v = _mm512_fmadd_ps(a.v, _mm512_set1_ps(b), v); }
  void add(Vector a, Vector b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
};
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Vector {
  static constexpr int LANES = 8;
  __m256 v;
  static Vector zeros() { return {_mm256_setzero_ps()}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Vector halves(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static __m256i raw(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static Vector bytes(const uint8_t* p) { return {_mm256_cvtepi32_ps(raw(p))}; }
  template <int BITS>
  static Vector code(__m256i raw, int shift) {
    __m256i shifted = _mm256_srli_epi32(raw, shift);
    return {_mm256_cvtepi32_ps(BITS + shift == 8 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi32((1 << BITS) - 1)))};
  }
  void add(float a) { v = _mm256_add_ps(v, _mm256_set1_ps(a)); }
  void add(Vector a, float b) { v = _mm256_fmadd_ps(a.v, _mm256_set1_ps(b), v); }
  void add(Vector a, Vector b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
};
#elif defined(__aarch64__)
struct Vector {
  static constexpr int LANES = 4;
  float32x4_t v;
  static Vector zeros() { return {vdupq_n_f32(0)}; }
  static Vector load(const float* p) { return {vld1q_f32(p)}; }
  void store(float* p) const { vst1q_f32(p, v); }
  static Vector halves(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
  static uint32x4_t raw(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  }
  static Vector bytes(const uint8_t* p) { return {vcvtq_f32_u32(raw(p))}; }
  template <int BITS>
  static Vector code(uint32x4_t raw, int shift) {
    return {vcvtq_f32_u32(vandq_u32(vshlq_u32(raw, vdupq_n_s32(-shift)), vdupq_n_u32((1 << BITS) - 1)))};
  }
  void add(float a) { v = vaddq_f32(v, vdupq_n_f32(a)); }
  void add(Vector a, float b) { v = vfmaq_n_f32(v, a.v, b); }
  void add(Vector a, Vector b) { v = vfmaq_f32(v, a.v, b.v); }
};
#endif

inline float half(uint16_t bits) {  // a float16 that is finite
  uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude = exponent ? std::ldexp(float(mantissa | 1024), int(exponent) - 25) : std::ldexp(float(mantissa), -24);
  return bits >> 15 ? -magnitude : magnitude;
}

struct Scalar {  // the same for one output: where there are no vectors, and for what is left of a row
  static constexpr int LANES = 1;
  float v;
  static Scalar zeros() { return {0}; }
  static Scalar load(const float* p) { return {*p}; }
  void store(float* p) const { *p = v; }
  static Scalar halves(const uint16_t* p) { return {half(*p)}; }
  static uint32_t raw(const uint8_t* p) { return *p; }
  static Scalar bytes(const uint8_t* p) { return {float(*p)}; }
  template <int BITS>
  static Scalar code(uint32_t raw, int shift) {
    return {float(raw >> shift & ((1 << BITS) - 1))};
  }
  void add(float a) { v += a; }
  void add(Scalar a, float b) { v += a.v * b; }
  void add(Scalar a, Scalar b) { v += a.v * b.v; }
};

#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) && !defined(__aarch64__)
using Vector = Scalar;
#endif

// y[t, n .. n + W lanes] += the share of group g, for T rows.
template <typename V, int BITS, int T, int W>
inline void block(const float* x, const float* sums, const Matrix& w, int64_t g, int64_t n, float* y) {
  constexpr int PER_BYTE = 8 / BITS, MIDDLE = 1 << (BITS - 1);
  V total[T][W];
  for (int t = 0; t < T; t++)
    for (int i = 0; i < W; i++) total[t][i] = V::zeros();
  const int64_t rows = w.group / PER_BYTE;
  const uint8_t* codes = w.codes + g * rows * w.outputs + n;
  const float* at = x + g * w.group;
  for (int64_t r = 0; r < rows; r++, codes += w.outputs, at += PER_BYTE) {
    __builtin_prefetch(codes + BLOCK);  // what this group's next block reads: rows are too many streams for the hardware
    for (int i = 0; i < W; i++) {
      auto raw = V::raw(codes + i * V::LANES);
      for (int p = 0; p < PER_BYTE; p++) {
        V code = V::template code<BITS>(raw, p * BITS);
        for (int t = 0; t < T; t++) total[t][i].add(code, at[t * w.inputs + p]);
      }
    }
  }
  for (int i = 0; i < W; i++) {
    const int64_t out = n + i * V::LANES;
    V scale = V::halves(w.scale + g * w.outputs + out);
    for (int t = 0; t < T; t++) {
      if (w.zero)
        total[t][i].add(V::bytes(w.zero + g * w.outputs + out), -sums[t]);
      else
        total[t][i].add(-MIDDLE * sums[t]);
      V sum = V::load(y + t * w.outputs + out);
      sum.add(total[t][i], scale);
      sum.store(y + t * w.outputs + out);
    }
  }
}

template <typename V, int BITS, int W>
inline void rows(const float* x, int64_t T, const float* sums, const Matrix& w, int64_t g, int64_t n, float* y) {
  for (; T >= 4; T -= 4, x += 4 * w.inputs, sums += 4, y += 4 * w.outputs) block<V, BITS, 4, W>(x, sums, w, g, n, y);
  if (T == 3) block<V, BITS, 3, W>(x, sums, w, g, n, y);
  if (T == 2) block<V, BITS, 2, W>(x, sums, w, g, n, y);
  if (T == 1) block<V, BITS, 1, W>(x, sums, w, g, n, y);
}

// Outputs first .. last of y[T, outputs] = x[T, inputs] w.
template <int BITS>
void product(const float* x, int64_t T, const Matrix& w, int64_t first, int64_t last, float* y) {
  for (int64_t t = 0; t < T; t++) std::memset(y + t * w.outputs + first, 0, (last - first) * sizeof(float));
  std::vector<float> sums(T);
  for (int64_t g = 0; g < w.inputs / w.group; g++) {
    for (int64_t t = 0; t < T; t++) {
      sums[t] = 0;
      for (int64_t k = 0; k < w.group; k++) sums[t] += x[t * w.inputs + g * w.group + k];
    }
    int64_t n = first;
    for (; n + BLOCK <= last; n += BLOCK) rows<Vector, BITS, BLOCK / Vector::LANES>(x, T, sums.data(), w, g, n, y);
    for (; n + Vector::LANES <= last; n += Vector::LANES) rows<Vector, BITS, 1>(x, T, sums.data(), w, g, n, y);
    for (; n < last; n++) rows<Scalar, BITS, 1>(x, T, sums.data(), w, g, n, y);
  }
}

}  // namespace integer_linear
