// Calls the C interface with right, damaged and random arguments, on buffers of exactly the lengths it is told, under
// AddressSanitizer and UndefinedBehaviorSanitizer; and checks that all instruction sets and thread counts agree.
// tests/native/run builds and runs it.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "fxquant_native.h"

namespace {

std::mt19937 generator(0);
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float number() { return std::normal_distribution<float>()(generator); }
bool one_in(int n) { return any(1, n) == 1; }

std::vector<uint8_t> bytes(size_t count) {
    std::vector<uint8_t> found(count);
    for (uint8_t &byte : found) byte = static_cast<uint8_t>(any(0, 255));
    return found;
}
std::vector<float> floats(size_t count) {
    std::vector<float> found(count);
    for (float &x : found) x = number() * 5;
    return found;
}

void fail(const char *what) {
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

FxqQuantizer quantizer(bool uniform = false) {
    FxqQuantizer q{};
    q.kind = uniform ? 0 : static_cast<int32_t>(any(0, 2));
    q.scale = std::abs(number()) * 0.1f + 1e-4f;
    q.low = static_cast<int32_t>(any(0, 128));
    q.high = static_cast<int32_t>(any(q.low, 255));
    q.zero = static_cast<int32_t>(any(0, 255));
    q.bits = static_cast<int32_t>(any(2, q.kind == FXQ_LOG2 ? 4 : 8));
    q.shift_small = static_cast<int32_t>(any(0, 4));
    q.shift_large = static_cast<int32_t>(any(q.shift_small, 24));
    q.negative = static_cast<int32_t>(any(0, 1));
    return q;
}

FxqLevels levels() {
    FxqLevels found{};
    found.count = static_cast<int32_t>(any(1, FXQ_MAX_DIGITS));
    found.identity = found.count == 1 && one_in(2);
    found.zero = static_cast<int32_t>(any(0, (int64_t(1) << (8 * found.count)) - 1));
    found.unit = 0.01f;
    for (auto &digit : found.digit)
        for (uint8_t &byte : digit) byte = static_cast<uint8_t>(any(0, 255));
    return found;
}

// Overwrites a few bytes, as a damaged or hostile file would.
template <class T>
void damage(T *value, size_t count) {
    uint8_t *data = reinterpret_cast<uint8_t *>(value);
    for (int64_t i = any(1, 4); i; --i) data[any(0, static_cast<int64_t>(count) - 1)] = static_cast<uint8_t>(any(0, 255));
}

// Runs `work` in every instruction set and with several threads; what it returns must always be the same.
template <class Work>
void compare(const Work &work, const char *what) {
    fxq_select(0);
    const auto expected = work(1);
    for (int32_t set = 0; set <= fxq_best(); ++set)
        for (const int32_t threads : {1, 3}) {
            fxq_select(set);
            if (work(threads) != expected) fail(what);
        }
}

void linear(bool damaged) {
    FxqLinear spec{};
    spec.out_features = any(1, 90);
    spec.in_features = any(1, 90);
    spec.weight_bits = static_cast<int32_t>(any(2, 8));
    spec.epilogue = static_cast<int32_t>(any(0, 3));
    spec.ranges = spec.epilogue == FXQ_CODES && spec.out_features % 3 == 0 ? 3 : 1;
    spec.input = levels();
    for (int i = 0; i < FXQ_MAX_RANGES; ++i) {
        spec.output[i] = quantizer(spec.epilogue == FXQ_CODES);
        spec.factor[i] = number();
    }
    const int64_t count = spec.out_features * spec.in_features;
    std::vector<int8_t> codes(count);
    const int limit = 1 << (spec.weight_bits - 1);
    for (int8_t &code : codes) code = static_cast<int8_t>(any(-limit, limit - 1));
    const auto scale = floats(spec.out_features), bias = floats(spec.out_features);
    std::vector<uint8_t> layout(fxq_linear_bytes(&spec));
    if (fxq_linear_pack(&spec, codes.data(), count, scale.data(), bias.data(), spec.out_features * 4, layout.data(),
                        static_cast<int64_t>(layout.size())))
        fail("a good layer is refused");
    if (damaged) damage(layout.data(), one_in(2) ? sizeof spec + 8 : layout.size());
    const int64_t rows = any(0, 40);
    const auto input = bytes(rows * spec.in_features);
    const auto residual = floats(rows * spec.out_features);
    const bool is_float = spec.epilogue < FXQ_CODES;
    const auto run = [&](int32_t threads) {
        std::vector<uint8_t> out(rows * spec.out_features * (is_float ? 4 : 1) + 1);
        const bool adds = spec.epilogue == FXQ_RESIDUAL;
        const int32_t status = fxq_linear(
            layout.data(), static_cast<int64_t>(layout.size()), input.data(), static_cast<int64_t>(input.size()), rows,
            adds ? residual.data() : nullptr, adds ? static_cast<int64_t>(residual.size()) * 4 : 0, out.data(),
            static_cast<int64_t>(out.size()) - 1, threads);
        if (status && !damaged && rows) fail(fxq_message(status));
        return out;
    };
    if (damaged) run(2);  // floats in a damaged layout may be NaN, which compare equal to nothing
    else compare(run, "linear layers differ");
}

void attention(bool damaged) {
    FxqAttention spec{};
    spec.heads = any(1, 3);
    spec.head_size = any(1, 40);
    for (int32_t &zero : spec.zero) zero = static_cast<int32_t>(any(0, 255));
    spec.score_scale = 1e-4f;
    spec.value_scale = 1e-3f;
    spec.softmax = quantizer();
    spec.softmax_levels = levels();
    spec.output = quantizer();
    const int64_t batch = any(1, 3), tokens = any(1, 60), groups = any(1, 3);
    const int64_t elements = batch * tokens * spec.heads * spec.head_size;
    const auto bias = floats(groups * spec.heads * tokens * tokens);
    const bool with_bias = one_in(2);
    const auto qkv = bytes(3 * elements);
    if (damaged) damage(&spec, sizeof spec);
    compare(
        [&](int32_t threads) {
            std::vector<uint8_t> out(elements);
            fxq_attention(&spec, qkv.data(), 3 * elements, batch, tokens, with_bias ? bias.data() : nullptr,
                          with_bias ? static_cast<int64_t>(bias.size()) * 4 : 0, out.data(), elements, threads);
            return out;
        },
        "attentions differ");
}

void matmul(bool damaged) {
    FxqLevels left_levels = levels();
    const int64_t batch = any(0, 3), n = any(1, 50), k = any(1, 50), m = any(1, 50);
    const auto left = bytes(batch * n * k), right = bytes(batch * k * m);
    int64_t told = batch;
    int32_t zero = static_cast<int32_t>(any(0, 255));
    if (damaged) {
        damage(&left_levels, sizeof left_levels);
        if (one_in(3)) damage(&told, sizeof told);
        if (one_in(3)) damage(&zero, sizeof zero);
    }
    const int32_t transposed = static_cast<int32_t>(any(0, 1));
    compare(
        [&](int32_t threads) {
            std::vector<uint8_t> out(batch * n * m * 4 + 1);
            fxq_matmul(&left_levels, zero, 0.01f, left.data(), batch * n * k, right.data(), batch * k * m, transposed,
                       told, n, k, m, reinterpret_cast<float *>(out.data()), batch * n * m * 4, threads);
            return out;
        },
        "products differ");
}

void norm_and_quantize(bool damaged) {
    FxqQuantizer q = quantizer();
    if (damaged) damage(&q, sizeof q);
    const int64_t rows = any(0, 70), channels = any(1, 100);
    auto x = floats(rows * channels);
    for (float &value : x)
        if (one_in(50)) value = one_in(2) ? 1e38f : -1e38f;
    const auto weight = floats(channels), bias = floats(channels);
    compare(
        [&](int32_t threads) {
            std::vector<uint8_t> out(rows * channels + 1), other(rows * channels + 1);
            fxq_layer_norm(&q, x.data(), rows, channels, weight.data(), bias.data(), 1e-6f, out.data(), rows * channels,
                           threads);
            fxq_quantize(&q, x.data(), rows * channels, other.data(), rows * channels, threads);
            out.insert(out.end(), other.begin(), other.end());
            return out;
        },
        "norms or codes differ");
}

// Random specs and lengths: nothing may be read or written but what the lengths cover.
void garbage() {
    FxqLinear spec;
    const auto noise = bytes(sizeof spec);
    std::memcpy(static_cast<void *>(&spec), noise.data(), sizeof spec);
    if (one_in(2)) spec.out_features = any(-2, 1 << 20);
    if (one_in(2)) spec.in_features = any(-2, 1 << 20);
    if (one_in(2)) spec.weight_bits = static_cast<int32_t>(any(0, 9));
    auto layout = bytes(any(0, 4000)), codes = bytes(any(1, 100)), out = bytes(any(1, 100));
    const int64_t rows = any(-2, 50);
    fxq_linear_bytes(&spec);
    fxq_linear_pack(&spec, reinterpret_cast<int8_t *>(codes.data()), static_cast<int64_t>(codes.size()),
                    reinterpret_cast<float *>(out.data()), nullptr, 4, layout.data(), static_cast<int64_t>(layout.size()));
    if (fxq_linear(layout.data(), static_cast<int64_t>(layout.size()), codes.data(), static_cast<int64_t>(codes.size()),
                   rows, nullptr, 0, out.data(), static_cast<int64_t>(out.size()), 1) == FXQ_OK)
        fail("garbage is taken for a layer");
}

}  // namespace

int main(int count, char **arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 150;
    for (int round = 0; round < rounds; ++round)
        for (const bool damaged : {false, true}) {
            linear(damaged);
            attention(damaged);
            matmul(damaged);
            norm_and_quantize(damaged);
            garbage();
        }
    std::printf("%d rounds on %s and %d sets below it\n", rounds, fxq_name(fxq_best()), fxq_best());
    return 0;
}
