// Runs a program: each operation is one call of a kernel, or one loop.

#include <algorithm>
#include <cstring>

#include "program.h"

namespace fxq {
namespace {

constexpr int64_t kArenaAtOnce = int64_t(1) << 26, kBlock = 1 << 14;

// A checked operation on some images.
struct Run {
    const Program &program;
    const FxqOperation &operation;
    const std::vector<uint8_t *> &at;
    int64_t images;
    int32_t threads;

    bool is_there(int i) const { return operation.input[i] >= 0; }
    const FxqTensor &tensor(int i) const { return program.tensors[size_t(operation.input[i])]; }
    const FxqTensor &result() const { return program.tensors[size_t(operation.result)]; }
    const uint8_t *bytes(int i) const { return is_there(i) ? at[size_t(operation.input[i])] : nullptr; }
    const float *floats(int i) const { return reinterpret_cast<const float *>(bytes(i)); }
    int64_t elements(int i) const { return is_there(i) ? tensor(i).elements * (tensor(i).place == kConstant ? 1 : images) : 0; }
    uint8_t *out() const { return at[size_t(operation.result)]; }
    int64_t out_bytes() const { return images * tensor_bytes(result()); }
    template <class Spec>
    Spec spec(int i) const {
        Spec found;
        std::memcpy(&found, bytes(i), sizeof found);
        return found;
    }

    int32_t quantize() const {
        const auto quantizer = spec<FxqQuantizer>(1);
        return fxq_quantize(&quantizer, floats(0), elements(0), out(), out_bytes(), threads);
    }
    int32_t linear() const {
        FxqLinear header;
        if (const int32_t status = open_linear(bytes(1), elements(1), &header)) return status;
        return fxq_linear(bytes(1), elements(1), bytes(0), elements(0), elements(0) / header.in_features, floats(2),
                          elements(2) * 4, out(), out_bytes(), threads);
    }
    int32_t attention() const {
        const auto found = spec<FxqAttention>(1);
        const int64_t tokens = operation.sizes[0], windows = elements(0) / (3 * tokens * found.heads * found.head_size);
        return fxq_attention(&found, bytes(0), elements(0), windows, tokens, floats(2), elements(2) * 4, out(), out_bytes(),
                             threads);
    }
    int32_t layer_norm() const {
        const auto quantizer = spec<FxqQuantizer>(1);
        const int64_t channels = operation.sizes[0];
        return fxq_layer_norm(&quantizer, floats(0), elements(0) / channels, channels, floats(2), floats(3),
                              operation.epsilon, out(), out_bytes(), threads);
    }
    int32_t norm() const {
        const int64_t channels = operation.sizes[0];
        return fxq_norm(floats(0), elements(0) / channels, channels, floats(2), floats(3), operation.epsilon,
                        reinterpret_cast<float *>(out()), out_bytes(), threads);
    }
    int32_t chain() const {
        const int64_t tokens = operation.sizes[0], channels = spec<FxqChain>(1).channels;
        return fxq_chain(bytes(1), elements(1), elements(0) / (channels * tokens), tokens, floats(0), elements(0) * 4, out(),
                         out_bytes(), threads);
    }
    int32_t mean() const {
        const int64_t rows = operation.sizes[0], channels = operation.sizes[1];
        return fxq_mean(floats(0), elements(0) / (rows * channels), rows, channels, reinterpret_cast<float *>(out()),
                        out_bytes(), threads);
    }

    // Calls task(begin, end) for blocks of `count` things.
    template <class Task>
    int32_t in_blocks(int64_t count, int64_t block, const Task &task) const {
        struct Work {
            const Task &task;
            int64_t count, block;
        } work{task, count, block};
        const auto run = [](void *self, int64_t i) {
            const Work &w = *static_cast<Work *>(self);
            w.task(i * w.block, std::min(w.count, (i + 1) * w.block));
        };
        return parallel((count + block - 1) / block, threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
    }

    int32_t move() const {
        struct Source {
            const uint8_t *from;
            int64_t begin, end, stride;  // its pieces; bytes from image to image
        };
        const int64_t piece = operation.sizes[0], pieces = tensor(0).elements;
        Source sources[kInputs];
        int count = 0;
        for (int64_t begin = 0; count + 1 < kInputs && is_there(count + 1); begin = sources[count++].end) {
            const FxqTensor &t = tensor(count + 1);
            sources[count] = {bytes(count + 1), begin, begin + tensor_bytes(t) / piece,
                              t.place == kConstant ? 0 : tensor_bytes(t)};
        }
        const int32_t *const index = reinterpret_cast<const int32_t *>(bytes(0));
        uint8_t *const to = out();
        const auto piece_of = [piece](const Source &source, int64_t image, int64_t number) {
            return source.from + image * source.stride + (number - source.begin) * piece;
        };
        return in_blocks(images * pieces, std::max<int64_t>(1, kBlock / piece), [&](int64_t begin, int64_t end) {
            int64_t image = begin / pieces, i = begin % pieces;
            for (int64_t n = begin; n < end; ++n) {
                // Whoever writes to the file while it is open gets other numbers, and no other memory.
                const int32_t from = *const_cast<const volatile int32_t *>(index + i);
                int s = 0;
                while (s < count && from >= sources[s].end) ++s;
                if (from < 0 || s == count) std::memset(to + n * piece, operation.fill, size_t(piece));
                else std::memcpy(to + n * piece, piece_of(sources[s], image, from), size_t(piece));
                if (++i == pieces) i = 0, ++image;
            }
        });
    }

    template <class Operator>
    int32_t arithmetic(const Operator &apply) const {
        const float *const x = floats(0), *const y = floats(1);
        float *const to = reinterpret_cast<float *>(out());
        const int64_t period = elements(1);
        if (period == 1)
            return in_blocks(elements(0), kBlock, [&, number = y[0]](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) to[i] = apply(x[i], number);
            });
        if (period == elements(0))
            return in_blocks(period, kBlock, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) to[i] = apply(x[i], y[i]);
            });
        const int64_t block = std::max<int64_t>(1, kBlock / period);  // repetitions
        return in_blocks(elements(0) / period, block, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n)
                for (int64_t i = 0; i < period; ++i) to[n * period + i] = apply(x[n * period + i], y[i]);
        });
    }
};

}  // namespace

int64_t Program::images_at_once(int64_t count) const {
    return std::min(count, std::max<int64_t>(1, kArenaAtOnce / std::max<int64_t>(1, file.arena_bytes)));
}

int32_t Program::run(size_t i, int64_t images, const std::vector<uint8_t *> &at, int32_t threads) const {
    const Run run{*this, operations[i], at, images, threads};
    switch (static_cast<Do>(operations[i].kind)) {
        case Do::quantize: return run.quantize();
        case Do::move: return run.move();
        case Do::linear: return run.linear();
        case Do::attention: return run.attention();
        case Do::layer_norm: return run.layer_norm();
        case Do::norm: return run.norm();
        case Do::chain: return run.chain();
        case Do::mean: return run.mean();
        case Do::add: return run.arithmetic([](float a, float b) { return a + b; });
        case Do::multiply: return run.arithmetic([](float a, float b) { return a * b; });
        case Do::divide: return run.arithmetic([](float a, float b) { return a / b; });
        default: return FXQ_UNSUPPORTED;
    }
}

}  // namespace fxq
