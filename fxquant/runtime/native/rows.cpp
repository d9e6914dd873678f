// What stays in float between kernels: layer norms that nobody wants as bytes, means over tokens. One loop for all
// instruction sets, so that there is one way to round.

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace fxq {
namespace {

#include "sums.inl"

constexpr int64_t kRows = 64;  // in a task

}  // namespace
}  // namespace fxq

using namespace fxq;

int32_t fxq_norm(const float *x, int64_t rows, int64_t channels, const float *weight, const float *bias, float epsilon,
                 float *out, int64_t out_bytes, int32_t threads) {
    if (!x || !out) return FXQ_NULL;
    if (!std::isfinite(epsilon) || epsilon < 0) return FXQ_QUANTIZER;
    if (!is_size(channels) || !holds(out_bytes, product(rows, channels), 4)) return FXQ_SIZE;
    struct Work {
        const float *x, *weight, *bias;
        float *out;
        int64_t rows, channels;
        float epsilon;
        void run(int64_t index) const {
            for (int64_t row = index * kRows; row < std::min(rows, (index + 1) * kRows); ++row) {
                const float *const from = x + row * channels;
                float *const to = out + row * channels;
                const float mean = sum<1>(from, channels, 0.0f) / float(channels);
                const float variance = sum<2>(from, channels, mean) / float(channels);
                const float gain = 1.0f / __builtin_sqrtf(variance + epsilon);
                for (int64_t c = 0; c < channels; ++c) {
                    float y = (from[c] - mean) * gain;
                    if (weight) y = y * weight[c];
                    to[c] = bias ? y + bias[c] : y;
                }
            }
        }
    } work{x, weight, bias, out, rows, channels, epsilon};
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel((rows + kRows - 1) / kRows, threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
}

int32_t fxq_mean(const float *x, int64_t groups, int64_t rows, int64_t channels, float *out, int64_t out_bytes,
                 int32_t threads) {
    if (!x || !out) return FXQ_NULL;
    if (!is_size(rows) || !is_size(channels) || product(groups, rows, channels) < 0 ||
        !holds(out_bytes, product(groups, channels), 4))
        return FXQ_SIZE;
    struct Work {
        const float *x;
        float *out;
        int64_t rows, channels;
        void run(int64_t group) const {
            const float *from = x + group * rows * channels;
            std::vector<double> sums(static_cast<size_t>(channels));
            for (int64_t row = 0; row < rows; ++row, from += channels)
                for (int64_t c = 0; c < channels; ++c) sums[size_t(c)] += double(from[c]);
            for (int64_t c = 0; c < channels; ++c) out[group * channels + c] = float(sums[size_t(c)] / double(rows));
        }
    } work{x, out, rows, channels};
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel(groups, threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
}
