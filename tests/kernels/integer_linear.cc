// The products of pallas_kernels/integer_linear/product.h against sums in double, for processors that run it alone.
#include <cstdio>
#include <random>

#include "product.h"

using namespace integer_linear;

template <int BITS>
bool agrees(int64_t T, int64_t K, int64_t N, int64_t group, bool zeros) {
  std::mt19937 random(BITS);
  std::normal_distribution<float> normal(0.5f);
  std::vector<float> x(T * K), y(T * N);
  std::vector<uint8_t> codes(K * BITS / 8 * N), zero(K / group * N);
  std::vector<uint16_t> scale(K / group * N);
  for (auto& v : x) v = normal(random);
  for (auto& v : codes) v = random();
  for (auto& v : zero) v = random() & ((1 << BITS) - 1);
  for (auto& v : scale) v = 0x2000 + 8 * (random() & 127);  // 2^-7 to 2^-6
  Matrix w{codes.data(), scale.data(), zeros ? zero.data() : nullptr, K, N, group};
  product<BITS>(x.data(), T, w, 0, N, y.data());
  double worst = 0, largest = 0;
  for (int64_t t = 0; t < T; t++)
    for (int64_t n = 0; n < N; n++) {
      double sum = 0;
      for (int64_t k = 0; k < K; k++) {
        const int64_t g = k / group * N + n;
        const int code = codes[k * BITS / 8 * N + n] >> (k % (8 / BITS) * BITS) & ((1 << BITS) - 1);
        sum += x[t * K + k] * double(half(scale[g])) * (code - (zeros ? zero[g] : 1 << (BITS - 1)));
      }
      worst = std::max(worst, std::abs(sum - y[t * N + n])), largest = std::max(largest, std::abs(sum));
    }
  std::printf("%d bits, %ld x %ld x %ld: %.1e of the largest\n", BITS, long(T), long(K), long(N), worst / largest);
  return worst <= 1e-5 * largest;
}

int main() {
  return !(agrees<4>(1, 256, 192, 128, false) && agrees<4>(7, 128, 83, 32, true) && agrees<8>(3, 256, 100, 128, false) &&
           agrees<2>(2, 128, 70, 32, true));
}
