// A chain of layers on a few images at a time: what one step writes is still in the cache when the next one reads it.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace fxq {
namespace {

constexpr int64_t kMaxSteps = 4096, kCacheBytes = 1 << 21;

struct Value {
    int64_t width = 0, bytes = 0;  // elements of a row, bytes of an element
    int64_t last = 0;              // the last step that reads it
    int slot = -1;
};

struct Step {
    FxqStep step;
    FxqLinear linear;
    FxqQuantizer quantizer;
    FxqAttention attention;
};

struct Chain {
    const uint8_t *memory;
    int64_t bytes, tokens;
    std::vector<Step> steps;
    std::vector<Value> values;
    std::vector<int64_t> slots;  // bytes of a row

    // A part of the chain's memory that holds `count` floats, null where there is none; false where it does not fit.
    bool floats(int64_t offset, int64_t count, const float **found) const {
        *found = nullptr;
        if (offset == 0) return true;
        if (offset % 64 || count < 0 || !fits(offset, count * 4)) return false;
        *found = reinterpret_cast<const float *>(memory + offset);
        return true;
    }
    bool fits(int64_t offset, int64_t size) const {
        return offset > 0 && size >= 0 && offset <= bytes && size <= bytes - offset;
    }
    template <class Spec>
    bool copy(const FxqStep &step, Spec *spec) const {
        if (step.bytes != sizeof(Spec) || !fits(step.offset, step.bytes)) return false;
        std::memcpy(spec, memory + step.offset, sizeof(Spec));
        return true;
    }
    int32_t open();
    int32_t open(Step &s, Value *result);
    void place();
    bool run(int64_t images, const float *x, uint8_t *out, int32_t threads) const;
};

int32_t Chain::open() {
    FxqChain header;
    if (bytes < static_cast<int64_t>(sizeof header)) return FXQ_LAYOUT;
    std::memcpy(&header, memory, sizeof header);
    if (header.magic != FXQ_CHAIN_MAGIC || header.version != kVersion || !is_size(header.count, kMaxSteps) ||
        !is_size(header.channels) || !fits(sizeof header, header.count * static_cast<int64_t>(sizeof(FxqStep))))
        return FXQ_LAYOUT;
    steps.resize(static_cast<size_t>(header.count));
    values.resize(steps.size() + 1);
    values[0].width = header.channels, values[0].bytes = 4;
    for (size_t i = 0; i < steps.size(); ++i) {
        std::memcpy(&steps[i].step, memory + sizeof header + i * sizeof(FxqStep), sizeof(FxqStep));
        const FxqStep &step = steps[i].step;
        for (const int32_t value : {step.input, step.residual}) {
            if (value < 0 || value > static_cast<int32_t>(i)) return FXQ_LAYOUT;
            values[static_cast<size_t>(value)].last = static_cast<int64_t>(i);
        }
        if (const int32_t status = open(steps[i], &values[i + 1])) return status;
    }
    return FXQ_OK;
}

int32_t Chain::open(Step &s, Value *result) {
    const FxqStep &step = s.step;
    const Value &input = values[static_cast<size_t>(step.input)], &residual = values[static_cast<size_t>(step.residual)];
    const float *unused;
    if (step.kind != FXQ_ATTENTION && (step.bias_groups || step.bias_bytes)) return FXQ_SIZE;
    if (step.kind == FXQ_LAYER_NORM) {
        *result = {input.width, 1};
        const bool has_parts = floats(step.weight, input.width, &unused) && floats(step.bias, input.width, &unused);
        if (!copy(step, &s.quantizer) || !is_quantizer(s.quantizer)) return FXQ_QUANTIZER;
        if (!std::isfinite(step.epsilon) || step.epsilon < 0) return FXQ_QUANTIZER;
        return has_parts && input.bytes == 4 ? FXQ_OK : FXQ_SIZE;
    }
    if (step.kind == FXQ_LINEAR) {
        if (step.offset % 64 || !fits(step.offset, step.bytes)) return FXQ_LAYOUT;
        if (const int32_t status = open_linear(memory + step.offset, step.bytes, &s.linear)) return status;
        *result = {s.linear.out_features, s.linear.epilogue == FXQ_FLOAT || s.linear.epilogue == FXQ_RESIDUAL ? 4 : 1};
        if (s.linear.epilogue == FXQ_RESIDUAL && (residual.width != result->width || residual.bytes != 4)) return FXQ_SIZE;
        return input.bytes == 1 && input.width == s.linear.in_features ? FXQ_OK : FXQ_SIZE;
    }
    if (step.kind != FXQ_ATTENTION) return FXQ_LAYOUT;
    if (!copy(step, &s.attention)) return FXQ_QUANTIZER;
    if (const int32_t status = check(s.attention)) return status;
    *result = {s.attention.heads * s.attention.head_size, 1};
    const bool has_bias = step.bias != 0;
    if (has_bias ? !is_size(step.bias_groups) : step.bias_groups != 0) return FXQ_SIZE;
    const int64_t scores = product(step.bias_groups, s.attention.heads, tokens, tokens);
    if (!is_size(tokens, FXQ_MAX_INNER) || !holds(step.bias_bytes, scores, 4) || !floats(step.bias, scores, &unused))
        return FXQ_SIZE;
    return input.bytes == 1 && input.width == 3 * result->width ? FXQ_OK : FXQ_SIZE;
}

// Which memory each result uses: a slot whose value nobody reads any more, and preferably of that size. A linear layer
// may write over its residual, which it reads element by element.
void Chain::place() {
    std::vector<int64_t> free_after;  // by slot, the last step that reads it
    for (size_t i = 0; i + 1 < steps.size(); ++i) {
        Value &result = values[i + 1];
        const int64_t size = result.width * result.bytes;
        const FxqStep &step = steps[i].step;
        const bool adds = step.kind == FXQ_LINEAR && steps[i].linear.epilogue == FXQ_RESIDUAL;
        for (size_t slot = 0; slot < slots.size(); ++slot) {
            const bool is_own_residual = adds && values[static_cast<size_t>(step.residual)].slot == static_cast<int>(slot) &&
                                         free_after[slot] == static_cast<int64_t>(i);
            const bool is_free = free_after[slot] < static_cast<int64_t>(i) || is_own_residual;
            if (is_free && (result.slot < 0 || std::abs(slots[slot] - size) < std::abs(slots[size_t(result.slot)] - size)))
                result.slot = static_cast<int>(slot);
        }
        if (result.slot < 0) {
            result.slot = static_cast<int>(slots.size());
            slots.push_back(0), free_after.push_back(0);
        }
        const size_t slot = static_cast<size_t>(result.slot);
        slots[slot] = std::max(slots[slot], size);
        free_after[slot] = std::max(result.last, static_cast<int64_t>(i));
    }
}

bool Chain::run(int64_t images, const float *x, uint8_t *out, int32_t threads) const {
    const int64_t rows = images * tokens;
    std::vector<size_t> places;
    size_t total = 0;
    for (const int64_t slot : slots) {
        places.push_back(total);
        total += static_cast<size_t>(round_up(slot * rows, 64));
    }
    uint8_t *const slot_memory = static_cast<uint8_t *>(scratch(kChain, total));
    const auto at = [&](size_t value) -> uint8_t * {
        if (value == 0) return reinterpret_cast<uint8_t *>(const_cast<float *>(x));  // only read
        return value == steps.size() ? out : slot_memory + places[static_cast<size_t>(values[value].slot)];
    };
    for (size_t i = 0; i < steps.size(); ++i) {
        const Step &s = steps[i];
        const uint8_t *input = at(static_cast<size_t>(s.step.input));
        const float *weight = nullptr, *bias = nullptr;
        floats(s.step.bias, 0, &bias);
        bool finished;
        if (s.step.kind == FXQ_LAYER_NORM) {
            floats(s.step.weight, 0, &weight);
            finished = run_layer_norm({&s.quantizer, reinterpret_cast<const float *>(input), weight, bias,
                                       values[i + 1].width, s.step.epsilon, at(i + 1)}, rows, threads);
        } else if (s.step.kind == FXQ_LINEAR) {
            const float *residual = reinterpret_cast<const float *>(at(static_cast<size_t>(s.step.residual)));
            finished = run_linear({&s.linear, LinearPlaces(s.linear), memory + s.step.offset, input, rows, residual, at(i + 1)},
                                  threads);
        } else {
            finished = run_attention({&s.attention, input, tokens, s.step.bias_groups, bias, at(i + 1)}, images, threads);
        }
        if (!finished) return false;
    }
    return true;
}

}  // namespace
}  // namespace fxq

using namespace fxq;

int32_t fxq_chain(const uint8_t *memory, int64_t memory_bytes, int64_t images, int64_t tokens, const float *x,
                  int64_t x_bytes, void *out, int64_t out_bytes, int32_t threads) try {
    if (!memory || !x || !out) return FXQ_NULL;
    if (reinterpret_cast<uintptr_t>(memory) % 4) return FXQ_LAYOUT;
    if (!is_size(tokens)) return FXQ_SIZE;
    Chain chain{memory, memory_bytes, tokens, {}, {}, {}};
    if (const int32_t status = chain.open()) return status;
    chain.place();
    const Value &first = chain.values.front(), &last = chain.values.back();
    const int64_t rows = product(images, tokens);
    if (rows < 0 || !holds(x_bytes, product(rows, first.width), 4)) return FXQ_SIZE;
    if (!holds(out_bytes, product(rows, last.width), last.bytes)) return FXQ_SIZE;
    if (rows == 0) return FXQ_OK;
    int64_t groups = 1;  // image i takes group i mod groups, whichever piece it is in
    for (const Step &s : chain.steps) {
        groups = std::lcm(groups, std::max<int64_t>(1, s.step.bias_groups));
        if (images % groups) return FXQ_SIZE;
    }
    int64_t row_bytes = 0;
    for (const int64_t slot : chain.slots) row_bytes += slot;
    int64_t piece = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, row_bytes * tokens));
    piece = std::min(piece, std::max<int64_t>(1, (images + threads - 1) / std::max(threads, 1)));
    piece = round_up(piece, groups);
    struct Work {
        const Chain &chain;
        int64_t images, piece;
        const float *x;
        uint8_t *out;
        int32_t threads;
        void run(int64_t index) const {
            const int64_t from = index * piece, count = std::min(piece, images - from);
            const Value &input = chain.values.front(), &result = chain.values.back();
            if (!chain.run(count, x + from * chain.tokens * input.width,
                           out + from * chain.tokens * result.width * result.bytes, threads))
                throw std::bad_alloc();
        }
    } work{chain, images, piece, x, static_cast<uint8_t *>(out), 1};
    const int64_t pieces = (images + piece - 1) / piece;
    if (pieces < threads) work.threads = threads;  // each piece on all threads, one after the other
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel(pieces, pieces < threads ? 1 : threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
} catch (...) {
    return FXQ_MEMORY;
}
