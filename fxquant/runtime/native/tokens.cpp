// What lies between an image and the first block, so that nothing of it needs other threads than these.

#include <algorithm>
#include <cstring>

#include "kernels.h"

using namespace fxq;

static constexpr int64_t kRows = 64;  // of tokens, in a task

int32_t fxq_patches(const uint8_t *codes, int64_t code_bytes, int64_t batch, int64_t channels, int64_t height,
                    int64_t width, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                    int64_t stride_width, uint8_t *out, int64_t out_bytes, int32_t threads) {
    if (!codes || !out) return FXQ_NULL;
    if (!is_size(channels) || !is_size(height) || !is_size(width) || !is_size(stride_height) || !is_size(stride_width))
        return FXQ_SIZE;
    if (!is_size(kernel_height, height) || !is_size(kernel_width, width)) return FXQ_SIZE;
    const int64_t rows = (height - kernel_height) / stride_height + 1, columns = (width - kernel_width) / stride_width + 1;
    const int64_t patch = product(channels, kernel_height, kernel_width), image = product(channels, height, width);
    if (patch < 0 || image < 0 || !holds(code_bytes, product(batch, image), 1) ||
        !holds(out_bytes, product(batch, rows, columns, patch), 1))
        return FXQ_SIZE;
    struct Work {
        const uint8_t *codes;
        int64_t rows, columns, patch, image, channels, height, width, kernel_height, kernel_width, stride_height, stride_width;
        uint8_t *out;
        void run(int64_t index) const {
            const uint8_t *const from = codes + index / rows * image + index % rows * stride_height * width;
            uint8_t *to = out + index * columns * patch;
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t channel = 0; channel < channels; ++channel)
                    for (int64_t line = 0; line < kernel_height; ++line, to += kernel_width)
                        std::memcpy(to, from + (channel * height + line) * width + column * stride_width,
                                    static_cast<size_t>(kernel_width));
        }
    } work{codes, rows, columns, patch, image, channels, height, width, kernel_height, kernel_width, stride_height,
           stride_width, out};
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel(batch * rows, threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
}

int32_t fxq_tokens(const float *x, int64_t x_bytes, int64_t batch, int64_t tokens, int64_t channels,
                   const float *positions, int64_t position_bytes, const float *first, int64_t first_bytes, float *out,
                   int64_t out_bytes, int32_t threads) {
    if (!x || !positions || !out || (!first && first_bytes)) return FXQ_NULL;
    if (!is_size(tokens) || !is_size(channels) || first_bytes < 0 || first_bytes % (channels * 4)) return FXQ_SIZE;
    const int64_t before = first_bytes / (channels * 4);
    if (!is_size(before + tokens) || !holds(x_bytes, product(batch, tokens, channels), 4) ||
        !holds(position_bytes, product(tokens, channels), 4) ||
        !holds(out_bytes, product(batch, before + tokens, channels), 4))
        return FXQ_SIZE;
    struct Work {
        const float *x, *positions, *first;
        int64_t rows, tokens, before, channels;
        float *out;
        void run(int64_t index) const {
            for (int64_t row = index * kRows; row < std::min(rows, (index + 1) * kRows); ++row) {
                const int64_t image = row / (before + tokens), token = row % (before + tokens) - before;
                float *const to = out + row * channels;
                if (token < 0) {
                    std::memcpy(to, first + (token + before) * channels, static_cast<size_t>(channels) * 4);
                    continue;
                }
                const float *const a = x + (image * tokens + token) * channels, *const b = positions + token * channels;
                for (int64_t c = 0; c < channels; ++c) to[c] = a[c] + b[c];
            }
        }
    } work{x, positions, first, batch * (before + tokens), tokens, before, channels, out};
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel((work.rows + kRows - 1) / kRows, threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
}
