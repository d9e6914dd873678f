// Calls the C interface with right, damaged and random arguments, on buffers of exactly the lengths it is told, under
// AddressSanitizer and UndefinedBehaviorSanitizer; and checks that all instruction sets and thread counts agree.
// tests/runtime/native/run builds and runs it.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "fxquant_native.h"

namespace {

std::mt19937 generator(0);
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
// As good as normal, of whole numbers: logarithms differ between C libraries, and digests are to be the same.
float number() {
    int64_t sum = 0;
    for (int draw = 0; draw < 12; ++draw) sum += any(0, 4095);
    return static_cast<float>(2 * sum - 12 * 4095) / 8192;
}
bool one_in(int n) { return any(1, n) == 1; }

std::vector<uint8_t> bytes(size_t count) {
    std::vector<uint8_t> found(count);
    for (uint8_t &byte : found) byte = static_cast<uint8_t>(any(0, 255));
    return found;
}
// Half the time only such as lie close together, as codes of few bits do.
std::vector<uint8_t> codes_like(size_t count) {
    std::vector<uint8_t> found = bytes(count);
    if (one_in(2)) return found;
    const int64_t width = any(0, 40), low = any(0, 255 - width);
    for (uint8_t &byte : found) byte = static_cast<uint8_t>(low + byte % (width + 1));
    return found;
}
// Weights of so many bits: even, bell-shaped, or as large as they can be.
std::vector<int8_t> weights(size_t count, int32_t bits) {
    std::vector<int8_t> found(count);
    const int limit = 1 << (bits - 1);
    const int64_t kind = any(0, 2);
    for (int8_t &code : found) {
        const int64_t whole = kind == 0 ? any(-limit, limit - 1) : kind == 1 ? std::lround(number() * float(limit) / 4) : one_in(2) ? -limit : limit - 1;
        code = static_cast<int8_t>(std::min<int64_t>(std::max<int64_t>(whole, -limit), limit - 1));
    }
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

// Codes of a grid, each among the bytes it stands for.
void codebook(FxqQuantizer *q) {
    q->kind = FXQ_CODEBOOK, q->low = 0, q->high = 255;
    q->codes = static_cast<int32_t>(any(1, FXQ_MAX_CODES));
    int64_t first = 0;
    for (int32_t k = 0; k < q->codes; ++k) {
        const int64_t left = q->codes - 1 - k;
        q->below[k] = static_cast<uint8_t>(left ? any(first, std::min<int64_t>(first + 20, 255 - left)) : 255);
        q->code[k] = static_cast<uint8_t>(any(first, q->below[k]));
        first = q->below[k] + 1;
    }
}

// `grid`: of a uniform grid of bytes, all its codes or a codebook.
FxqQuantizer quantizer(bool grid = false) {
    FxqQuantizer q{};
    q.kind = grid ? 0 : static_cast<int32_t>(any(0, 2));
    q.scale = std::abs(number()) * 0.1f + 1e-4f;
    q.low = static_cast<int32_t>(any(0, 128));
    q.high = static_cast<int32_t>(any(q.low, 255));
    q.zero = static_cast<int32_t>(any(0, 255));
    q.bits = static_cast<int32_t>(any(2, q.kind == FXQ_LOG2 ? 4 : 8));
    q.shift_small = static_cast<int32_t>(any(0, 4));
    q.shift_large = static_cast<int32_t>(any(q.shift_small, 24));
    q.negative = static_cast<int32_t>(any(0, 1));
    if (one_in(grid ? 2 : 4)) codebook(&q);
    return q;
}

// Of an attention's softmax: no codebook; row-log half the time, with one digit and no zero.
void softmax(FxqQuantizer *q, FxqLevels *l) {
    while (q->kind == FXQ_CODEBOOK) *q = quantizer();
    if (one_in(2)) return;
    q->kind = FXQ_ROW_LOG, q->bits = static_cast<int32_t>(any(2, 8));
    q->scale = std::abs(number()) + 0.01f;
    l->count = 1, l->identity = 0, l->zero = 0;
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

// Of all results so far (FNV-1a): processors of any kind must come to the same one.
uint64_t digest = 14695981039346656037u;

// Runs `work` in every instruction set and with several threads; what it returns must always be the same.
template <class Work>
void compare(const Work &work, const char *what) {
    fxq_select(0);
    const std::vector<uint8_t> expected = work(1);
    for (const uint8_t byte : expected) digest = (digest ^ byte) * 1099511628211u;
    for (int32_t set = 0; set <= fxq_best(); ++set)
        for (const int32_t threads : {1, 3}) {
            if (fxq_select(set) != FXQ_OK) continue;  // a better set may run where this one does not
            if (work(threads) != expected) fail(what);
        }
}

// A table for a layer that has one, and none for others.
std::vector<uint8_t> table_of(FxqLinear *spec) {
    const bool has_table = spec->epilogue == FXQ_TABLE_CODES;
    spec->steps = has_table ? static_cast<int32_t>(any(1, FXQ_MAX_STEPS)) : 0;
    return bytes(has_table ? (1 + 2 * spec->steps) * FXQ_TABLE_ENTRIES / 256 : 0);
}

void linear(bool damaged) {
    FxqLinear spec{};
    spec.out_features = any(1, 90);
    spec.in_features = one_in(30) ? any(1500, 1700) : any(1, 90);  // some in several chunks
    spec.weight_bits = static_cast<int32_t>(any(2, 8));
    spec.epilogue = static_cast<int32_t>(any(0, 4));
    const auto table = table_of(&spec);
    spec.ranges = spec.epilogue == FXQ_CODES && spec.out_features % 3 == 0 ? 3 : 1;
    spec.input = levels();
    for (int i = 0; i < FXQ_MAX_RANGES; ++i) {
        spec.output[i] = quantizer(spec.epilogue == FXQ_CODES);
        spec.factor[i] = number();
    }
    const int64_t count = spec.out_features * spec.in_features;
    const auto codes = weights(count, spec.weight_bits);
    const auto scale = floats(spec.out_features), bias = floats(spec.out_features);
    std::vector<uint8_t> layout(fxq_linear_bytes(&spec));
    if (fxq_linear_pack(&spec, codes.data(), count, scale.data(), bias.data(), spec.out_features * 4, table.data(),
                        static_cast<int64_t>(table.size()), layout.data(), static_cast<int64_t>(layout.size())))
        fail("a good layer is refused");
    if (damaged) damage(layout.data(), one_in(2) ? sizeof spec + 8 : layout.size());
    const int64_t rows = any(0, one_in(3) ? 120 : 40);
    const auto input = codes_like(rows * spec.in_features);
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
    softmax(&spec.softmax, &spec.softmax_levels);
    spec.output = quantizer();
    const int64_t batch = any(1, 3), tokens = any(1, 60), groups = any(1, 3);
    const int64_t elements = batch * tokens * spec.heads * spec.head_size;
    const auto bias = floats(groups * spec.heads * tokens * tokens);
    const bool with_bias = one_in(2);
    const auto qkv = codes_like(3 * elements);
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
    const auto left = codes_like(batch * n * k), right = codes_like(batch * k * m);
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

// The layout of a random linear layer; FXQ_CODES has uniform quantizers and codebooks.
std::vector<uint8_t> linear_layout(int64_t out, int64_t in, int32_t epilogue, bool one_digit) {
    FxqLinear spec{};
    spec.out_features = out, spec.in_features = in, spec.epilogue = epilogue, spec.ranges = 1;
    spec.weight_bits = static_cast<int32_t>(any(2, 8));
    const auto table = table_of(&spec);
    spec.input = levels();
    if (one_digit) spec.input.count = spec.input.identity = 1, spec.input.zero %= 256;
    spec.output[0] = quantizer(epilogue == FXQ_CODES);
    spec.factor[0] = number();
    std::vector<int8_t> codes(out * in);
    for (int8_t &code : codes) code = static_cast<int8_t>(any(-2, 1));
    const auto scale = floats(out), bias = floats(out);
    std::vector<uint8_t> layout(fxq_linear_bytes(&spec));
    if (fxq_linear_pack(&spec, codes.data(), out * in, scale.data(), bias.data(), out * 4, table.data(),
                        static_cast<int64_t>(table.size()), layout.data(), static_cast<int64_t>(layout.size())))
        fail("a good layer is refused");
    return layout;
}

struct Block {
    int64_t heads, size, channels, hidden, images, tokens;
};

// Norm, qkv, attention, projection and residual, norm, fc1 with GELU, fc2 and residual.
void chain(bool damaged, const Block &sizes) {
    const int64_t heads = sizes.heads, size = sizes.size, channels = sizes.channels, hidden = sizes.hidden;
    const int64_t images = sizes.images, tokens = sizes.tokens, groups = any(0, 2), width = heads * size;
    FxqAttention attention_spec{};
    attention_spec.heads = heads, attention_spec.head_size = size;
    attention_spec.score_scale = attention_spec.value_scale = 1e-3f;
    attention_spec.softmax = quantizer(), attention_spec.output = quantizer(), attention_spec.softmax_levels = levels();
    softmax(&attention_spec.softmax, &attention_spec.softmax_levels);
    FxqStep steps[7]{};
    std::vector<uint8_t> memory(sizeof(FxqChain) + sizeof steps);
    const auto put = [&](const void *data, size_t count) {
        memory.resize((memory.size() + 63) / 64 * 64);
        const int64_t place = static_cast<int64_t>(memory.size());
        memory.insert(memory.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + count);
        return place;
    };
    const auto norm = [&](FxqStep &step, int32_t input) {
        const FxqQuantizer q = quantizer();
        const auto weight = floats(channels);
        step.kind = FXQ_LAYER_NORM, step.input = input, step.epsilon = 1e-6f, step.bytes = sizeof q;
        step.offset = put(&q, sizeof q);
        if (one_in(2)) step.weight = put(weight.data(), weight.size() * 4);
        if (one_in(2)) step.bias = put(weight.data(), weight.size() * 4);
    };
    const auto add = [&](FxqStep &step, int32_t input, int32_t residual, const std::vector<uint8_t> &layout) {
        step.kind = FXQ_LINEAR, step.input = input, step.residual = residual;
        step.offset = put(layout.data(), layout.size()), step.bytes = static_cast<int64_t>(layout.size());
    };
    norm(steps[0], 0);
    add(steps[1], 1, 0, linear_layout(3 * width, channels, FXQ_CODES, true));
    steps[2].kind = FXQ_ATTENTION, steps[2].input = 2, steps[2].bytes = sizeof attention_spec;
    steps[2].offset = put(&attention_spec, sizeof attention_spec);
    const auto bias = floats(groups * heads * tokens * tokens);
    if (groups) {
        steps[2].bias = put(bias.data(), bias.size() * 4), steps[2].bias_groups = groups;
        steps[2].bias_bytes = static_cast<int64_t>(bias.size()) * 4;
    }
    add(steps[3], 3, 0, linear_layout(channels, width, FXQ_RESIDUAL, false));
    norm(steps[4], 4);
    add(steps[5], 5, 0, linear_layout(hidden, channels, one_in(2) ? FXQ_GELU_CODES : FXQ_TABLE_CODES, false));
    add(steps[6], 6, 4, linear_layout(channels, hidden, FXQ_RESIDUAL, false));
    FxqChain header{FXQ_CHAIN_MAGIC, 6, 7, channels, 0, 0, 1, 0};
    if (one_in(2)) {
        const int64_t per_image = images && images % 2 == 0 ? 2 : 1;
        std::vector<int32_t> order(static_cast<size_t>(tokens * per_image));
        for (size_t i = 0; i < order.size(); ++i) {
            order[i] = static_cast<int32_t>(i);
            std::swap(order[i], order[static_cast<size_t>(any(0, static_cast<int64_t>(i)))]);
        }
        header.order = put(order.data(), order.size() * 4), header.order_rows = static_cast<int64_t>(order.size());
        header.returns = any(0, 1);
        if (channels % 2 == 0 && order.size() % 2 == 0 && one_in(3) && per_image == 2)
            header.parts = 2, header.returns = 0;
    }
    std::memcpy(memory.data(), &header, sizeof header);
    std::memcpy(memory.data() + sizeof header, steps, sizeof steps);
    if (damaged) damage(memory.data(), one_in(2) ? sizeof header + sizeof steps : memory.size());
    const auto x = floats(images * tokens * channels);
    const auto run = [&](int32_t threads) {
        std::vector<uint8_t> out(x.size() * 4 + 1);
        const int32_t status = fxq_chain(memory.data(), static_cast<int64_t>(memory.size()), images, tokens, x.data(),
                                         static_cast<int64_t>(x.size()) * 4, out.data(), static_cast<int64_t>(x.size()) * 4,
                                         threads);
        if (status && !damaged && images && (groups < 2 || images % groups == 0)) fail(fxq_message(status));
        return out;
    };
    if (damaged) run(2);
    else compare(run, "chains differ");
}

// Patches and tokens of any sizes, on buffers of exactly their lengths.
void before_blocks() {
    const int64_t batch = any(0, 3), channels = any(1, 4), height = any(1, 20), width = any(1, 20);
    const int64_t kernel[2] = {any(0, 8), any(1, 8)}, stride[2] = {any(0, 4), any(1, 4)};
    const auto codes = bytes(batch * channels * height * width);
    const bool fits = kernel[0] > 0 && stride[0] > 0 && kernel[0] <= height && kernel[1] <= width;
    const int64_t rows = fits ? (height - kernel[0]) / stride[0] + 1 : 1, columns = fits ? (width - kernel[1]) / stride[1] + 1 : 1;
    std::vector<uint8_t> out(static_cast<size_t>(batch * rows * columns * channels * kernel[0] * kernel[1]));
    const uint8_t unused = 0;
    uint8_t unwritten = 0;
    const int32_t status = fxq_patches(codes.empty() ? &unused : codes.data(), static_cast<int64_t>(codes.size()), batch,
                                       channels, height, width, kernel[0], kernel[1], stride[0], stride[1],
                                       out.empty() ? &unwritten : out.data(), static_cast<int64_t>(out.size()), 2);
    if ((status == FXQ_OK) != fits) fail("patches");
    const int64_t tokens = any(1, 100), front = any(0, 3), off = one_in(3) ? 1 : 0;
    const auto x = floats(batch * tokens * channels), positions = floats(tokens * channels), first = floats(front * channels);
    std::vector<float> joined(static_cast<size_t>(batch * (front + tokens) * channels + 1));
    const int32_t joined_status =
        fxq_tokens(x.empty() ? joined.data() : x.data(), static_cast<int64_t>(x.size()) * 4, batch, tokens, channels,
                   positions.data(), static_cast<int64_t>(positions.size()) * 4 - 4 * off, first.empty() ? nullptr : first.data(),
                   static_cast<int64_t>(first.size()) * 4, joined.data(), static_cast<int64_t>(joined.size()) * 4 - 4, 2);
    if ((joined_status == FXQ_OK) == (off == 1)) fail("tokens");
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
                    reinterpret_cast<float *>(out.data()), nullptr, 4, codes.data(), static_cast<int64_t>(codes.size()),
                    layout.data(), static_cast<int64_t>(layout.size()));
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
            chain(damaged, {any(1, 2), any(1, 20), any(1, 80), any(1, 80), any(0, 5), any(1, 40)});
            before_blocks();
            garbage();
        }
    chain(false, {3, 64, 192, 768, 1, 197});  // a block of a ViT-tiny
    std::printf("%d rounds and a block of a ViT-tiny on", rounds);
    for (int32_t set = 0; set <= fxq_best(); ++set)
        if (fxq_runs(set)) std::printf(" %s", fxq_name(set));
    std::printf("; digest %016llx\n", static_cast<unsigned long long>(digest));
    return 0;
}
