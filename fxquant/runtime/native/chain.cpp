// A chain of layers on a few images at a time: what one step writes is still in the cache when the next one reads it.

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace fxq {
namespace {

constexpr int64_t kMaxSteps = 4096, kCacheBytes = 1 << 21, kThreadRows = 64;

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

// What one `run` works on: where values lie, from which image on, how many images and rows.
struct Place {
    std::vector<uint8_t *> values;
    int64_t first, images, rows;
};

struct Chain {
    const uint8_t *memory;
    int64_t bytes, tokens;
    FxqChain header{};
    const int32_t *order = nullptr;
    std::vector<Step> steps;
    std::vector<Value> values;
    std::vector<int64_t> slots;  // bytes of a row
    Chain(const uint8_t *memory, int64_t bytes, int64_t tokens) : memory(memory), bytes(bytes), tokens(tokens) {}

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
    int64_t row_bytes() const {
        int64_t sum = 0;
        for (const int64_t slot : slots) sum += slot;
        return sum;
    }
    int32_t open(int64_t images);
    int32_t open_order();
    int32_t open(Step &s, Value *result);
    void place();
    bool run(int64_t first, int64_t images, const float *x, uint8_t *out, int32_t threads) const;
    bool run_by_rows(const Place &place, size_t begin, size_t end, int32_t threads) const;
    bool run_step(const Place &place, size_t i, int64_t row, int64_t rows, int32_t threads) const;
    void gather(int64_t first, int64_t images, const float *x, float *to) const;
    void give_back(int64_t first, int64_t images, const uint8_t *rows, uint8_t *out) const;
};

// images: of `tokens` rows of value 0 each, which fill whole images of x and whole groups of biases.
int32_t Chain::open(int64_t images) {
    if (reinterpret_cast<uintptr_t>(memory) % 4) return FXQ_LAYOUT;
    if (!is_size(tokens)) return FXQ_SIZE;
    if (bytes < static_cast<int64_t>(sizeof header)) return FXQ_LAYOUT;
    std::memcpy(&header, memory, sizeof header);
    if (header.magic != FXQ_CHAIN_MAGIC || header.version != kVersion || !is_size(header.count, kMaxSteps) ||
        !is_size(header.channels) || !fits(sizeof header, header.count * static_cast<int64_t>(sizeof(FxqStep))))
        return FXQ_LAYOUT;
    if (const int32_t status = open_order()) return status;
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
        if (step.bias_groups && images % step.bias_groups) return FXQ_SIZE;
    }
    const int64_t rows = product(images, tokens, header.parts);
    return rows < 0 || (order && rows % header.order_rows) ? FXQ_SIZE : FXQ_OK;
}

int32_t Chain::open_order() {
    const bool has_order = header.order != 0;
    if (!is_size(header.parts, FXQ_MAX_PARTS) || header.returns < 0 || header.returns > 1) return FXQ_LAYOUT;
    if (!has_order) return header.order_rows || header.parts != 1 || header.returns ? FXQ_LAYOUT : FXQ_OK;
    if (header.order % 64 || !is_size(header.order_rows) || !fits(header.order, header.order_rows * 4)) return FXQ_LAYOUT;
    if (header.channels % header.parts || header.order_rows % header.parts || (header.returns && header.parts != 1))
        return FXQ_LAYOUT;
    if (header.order_rows / header.parts % tokens) return FXQ_SIZE;
    order = reinterpret_cast<const int32_t *>(memory + header.order);
    std::vector<bool> is_there(static_cast<size_t>(header.order_rows));
    for (int64_t row = 0; row < header.order_rows; ++row) {
        if (order[row] < 0 || order[row] >= header.order_rows || is_there[size_t(order[row])]) return FXQ_LAYOUT;
        is_there[size_t(order[row])] = true;
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

// Which memory each result uses: a slot of that size whose value nobody reads any more, so that a row lies where others
// do not. A linear layer may write over its residual, which it reads element by element.
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
            if (slots[slot] == size && (free_after[slot] < static_cast<int64_t>(i) || is_own_residual))
                result.slot = static_cast<int>(slot);
        }
        if (result.slot < 0) {
            result.slot = static_cast<int>(slots.size());
            slots.push_back(size), free_after.push_back(0);
        }
        free_after[static_cast<size_t>(result.slot)] = std::max(result.last, static_cast<int64_t>(i));
    }
}

// Calls copy(row of the call, row of x or out) for the rows of value 0 that these images have, part by part.
template <class Copy>
void for_rows(const Chain &chain, int64_t first, int64_t images, const Copy &copy) {
    const int64_t per_image = chain.header.order_rows, parts = chain.header.parts;
    const int64_t begin = first * chain.tokens * parts, end = begin + images * chain.tokens * parts;
    int64_t image = begin / per_image * per_image, row = begin % per_image;
    for (int64_t i = begin; i < end; ++i) {
        copy(i - begin, image + chain.order[row]);
        if (++row == per_image) row = 0, image += per_image;
    }
}

void Chain::gather(int64_t first, int64_t images, const float *x, float *to) const {
    const int64_t width = header.channels / header.parts;
    for_rows(*this, first, images, [&](int64_t row, int64_t place) {
        std::memcpy(to + row * width, x + place * width, static_cast<size_t>(width) * 4);
    });
}

void Chain::give_back(int64_t first, int64_t images, const uint8_t *rows, uint8_t *out) const {
    const int64_t size = values.back().width * values.back().bytes;
    for_rows(*this, first, images, [&](int64_t row, int64_t place) {
        std::memcpy(out + place * size, rows + row * size, static_cast<size_t>(size));
    });
}

// `images` images from number `first` on. Between attentions, rows have nothing to do with one another: where there are
// many for each thread, it takes its own through all these layers, so that they stay in its cache.
bool Chain::run(int64_t first, int64_t images, const float *x, uint8_t *out, int32_t threads) const {
    const int64_t rows = images * tokens;
    const int64_t input_bytes = values.front().width * 4, result_bytes = values.back().width * values.back().bytes;
    std::vector<size_t> places;
    size_t total = 0;
    const auto reserve = [&](int64_t row_bytes) {
        places.push_back(total);
        total += static_cast<size_t>(round_up(row_bytes * rows, 64));
    };
    for (const int64_t slot : slots) reserve(slot);
    reserve(order ? input_bytes : 0);
    reserve(header.returns ? result_bytes : 0);
    uint8_t *const slot_memory = static_cast<uint8_t *>(scratch(kChain, total));
    uint8_t *const ordered = slot_memory + places[slots.size()], *const result = slot_memory + places.back();
    if (order) gather(first, images, x, reinterpret_cast<float *>(ordered));
    Place place{{}, first, images, rows};
    uint8_t *const input = reinterpret_cast<uint8_t *>(const_cast<float *>(x)) + first * tokens * input_bytes;  // only read
    place.values.push_back(order ? ordered : input);
    for (size_t i = 1; i < steps.size(); ++i)
        place.values.push_back(slot_memory + places[static_cast<size_t>(values[i].slot)]);
    place.values.push_back(header.returns ? result : out + first * tokens * result_bytes);
    const bool by_rows = threads > 1 && rows >= kThreadRows * threads;
    for (size_t i = 0; i < steps.size();) {
        size_t end = i + 1;
        if (steps[i].step.kind != FXQ_ATTENTION && by_rows)
            while (end < steps.size() && steps[end].step.kind != FXQ_ATTENTION) ++end;
        if (!(end - i > 1 ? run_by_rows(place, i, end, threads) : run_step(place, i, 0, rows, threads))) return false;
        i = end;
    }
    if (header.returns) give_back(first, images, result, out);
    return true;
}

bool Chain::run_by_rows(const Place &place, size_t begin, size_t end, int32_t threads) const {
    struct Work {
        const Chain &chain;
        const Place &place;
        size_t begin, end;
        int64_t rows;
    } work{*this, place, begin, end, (place.rows + threads - 1) / threads};
    const auto run = [](void *self, int64_t index) {
        const Work &w = *static_cast<Work *>(self);
        const int64_t row = index * w.rows;
        for (size_t i = w.begin; i < w.end; ++i)
            if (!w.chain.run_step(w.place, i, row, std::min(w.rows, w.place.rows - row), 1)) throw std::bad_alloc();
    };
    return parallel((place.rows + work.rows - 1) / work.rows, threads, run, &work);
}

// Step i on some rows; attention on all.
bool Chain::run_step(const Place &place, size_t i, int64_t row, int64_t rows, int32_t threads) const {
    const Step &s = steps[i];
    const auto at = [&](size_t value) { return place.values[value] + row * values[value].width * values[value].bytes; };
    const uint8_t *codes = at(static_cast<size_t>(s.step.input));
    const float *weight = nullptr, *bias = nullptr;
    floats(s.step.bias, 0, &bias);
    if (s.step.kind == FXQ_LAYER_NORM) {
        floats(s.step.weight, 0, &weight);
        return run_layer_norm({&s.quantizer, reinterpret_cast<const float *>(codes), weight, bias, values[i + 1].width,
                               s.step.epsilon, at(i + 1)}, rows, threads);
    }
    if (s.step.kind == FXQ_LINEAR) {
        const float *residual = reinterpret_cast<const float *>(at(static_cast<size_t>(s.step.residual)));
        return run_linear({&s.linear, LinearPlaces(s.linear), memory + s.step.offset, codes, rows, residual, at(i + 1)},
                          threads);
    }
    return run_attention({&s.attention, codes, tokens, s.step.bias_groups, place.first, bias, at(i + 1)}, place.images,
                         threads);
}

}  // namespace

int32_t check_chain(const uint8_t *memory, int64_t bytes, int64_t images, int64_t tokens, ChainRows *found) {
    Chain chain(memory, bytes, tokens);
    if (const int32_t status = chain.open(images)) return status;
    *found = {chain.values.front().width, chain.values.back().width, chain.values.back().bytes};
    return FXQ_OK;
}

}  // namespace fxq

using namespace fxq;

int32_t fxq_chain(const uint8_t *memory, int64_t memory_bytes, int64_t images, int64_t tokens, const float *x,
                  int64_t x_bytes, void *out, int64_t out_bytes, int32_t threads) try {
    if (!memory || !x || !out) return FXQ_NULL;
    Chain chain(memory, memory_bytes, tokens);
    if (const int32_t status = chain.open(images)) return status;
    chain.place();
    const Value &first = chain.values.front(), &last = chain.values.back();
    const int64_t rows = product(images, tokens);
    if (rows < 0 || !holds(x_bytes, product(rows, first.width), 4)) return FXQ_SIZE;
    if (!holds(out_bytes, product(rows, last.width), last.bytes)) return FXQ_SIZE;
    if (rows == 0) return FXQ_OK;
    int64_t piece = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, chain.row_bytes() * tokens));
    piece = std::min(piece, std::max<int64_t>(1, (images + threads - 1) / std::max(threads, 1)));
    struct Work {
        const Chain &chain;
        int64_t images, piece;
        const float *x;
        uint8_t *out;
        int32_t threads;
        void run(int64_t index) const {
            const int64_t from = index * piece;
            if (!chain.run(from, std::min(piece, images - from), x, out, threads)) throw std::bad_alloc();
        }
    } work{chain, images, piece, x, static_cast<uint8_t *>(out), 1};
    const int64_t pieces = (images + piece - 1) / piece;
    if (pieces < threads) work.threads = threads;  // each piece on all threads, one after the other
    const auto run = [](void *self, int64_t index) { static_cast<Work *>(self)->run(index); };
    return parallel(pieces, pieces < threads ? 1 : threads, run, &work) ? FXQ_OK : FXQ_MEMORY;
} catch (...) {
    return FXQ_MEMORY;
}
