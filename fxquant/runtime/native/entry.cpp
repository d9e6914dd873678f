// The C interface: checks what it is given, picks the instruction set, divides the work among threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels.h"

namespace fxq {
namespace {

bool always() { return true; }

struct Set {
    const Kernels *kernels;
    bool (*is_there)();
};

// Best last.
const Set kSets[] = {
    {&kScalar, always},
#ifdef FXQ_X86
    {&kAvx2, has_avx2},
#ifdef FXQ_AVX_VNNI
    {&kAvxVnni, has_avx_vnni},
#endif
#ifdef FXQ_AVX512
    {&kAvx512Vnni, has_avx512_vnni},
#endif
#endif
#ifdef FXQ_AMX
    {&kAmxInt8, has_amx},
#endif
#ifdef FXQ_NEON
    {&kNeon, always},
#ifdef FXQ_NEON_EXTENSIONS
    {&kNeonDotprod, has_neon_dotprod},
    {&kNeonI8mm, has_neon_i8mm},
#endif
#endif
};
constexpr int32_t kSetCount = sizeof(kSets) / sizeof(kSets[0]);

int32_t best() {
    int32_t found = kSetCount - 1;
    while (!kSets[found].is_there()) --found;
    return found;
}

int32_t selected = best();
const Kernels &kernels() { return *kSets[selected].kernels; }

struct LinearWork {
    LinearCall call;
    int64_t block_rows, block_units, unit_blocks;
    void split(int32_t threads) {
        // A block of rows and its digits stay in the second-level cache while every panel passes over them.
        const int64_t row_bytes = call.spec->in_features * call.spec->input.count;
        block_rows = round_up(std::max<int64_t>(96, (int64_t(1) << 18) / row_bytes), 96);
        const int64_t row_blocks = (call.rows + block_rows - 1) / block_rows;
        block_units = call.places.units;
        if (threads > 1 && row_blocks < int64_t(4) * threads) {
            const int64_t pieces = (int64_t(4) * threads + row_blocks - 1) / row_blocks;
            block_units = round_up((call.places.units + pieces - 1) / pieces, kPanelColumns / kUnit);
        }
        unit_blocks = (call.places.units + block_units - 1) / block_units;
    }
    static void run(void *self, int64_t index) {
        const LinearWork &work = *static_cast<LinearWork *>(self);
        const int64_t row = index / work.unit_blocks * work.block_rows;
        const int64_t unit = index % work.unit_blocks * work.block_units;
        kernels().linear(work.call, row, std::min(work.block_rows, work.call.rows - row), unit,
                         std::min(work.block_units, work.call.places.units - unit));
    }
};

int32_t done(bool finished) { return finished ? FXQ_OK : FXQ_MEMORY; }

}  // namespace

bool are_levels(const FxqLevels &levels) {
    if (levels.count < 1 || levels.count > FXQ_MAX_DIGITS || !is_positive(levels.unit)) return false;
    if (levels.identity != 0 && (levels.identity != 1 || levels.count != 1)) return false;
    return levels.zero >= 0 && levels.zero < (int64_t(1) << (8 * levels.count));
}

int32_t check(const FxqLinear &spec) {
    if (!is_size(spec.out_features) || !is_size(spec.in_features, FXQ_MAX_INNER)) return FXQ_SIZE;
    if (spec.weight_bits < 2 || spec.weight_bits > 8) return FXQ_WIDTH;
    if (spec.epilogue < FXQ_FLOAT || spec.epilogue > FXQ_TABLE_CODES || !are_levels(spec.input)) return FXQ_QUANTIZER;
    const bool gives_codes = spec.epilogue == FXQ_CODES, has_table = spec.epilogue == FXQ_TABLE_CODES;
    if (has_table ? spec.steps < 1 || spec.steps > FXQ_MAX_STEPS : spec.steps != 0) return FXQ_QUANTIZER;
    if (spec.ranges < 1 || spec.ranges > (gives_codes ? FXQ_MAX_RANGES : 1) || spec.out_features % spec.ranges)
        return FXQ_QUANTIZER;
    for (int32_t i = 0; i < spec.ranges && spec.epilogue >= FXQ_CODES && !has_table; ++i) {
        if (!is_quantizer(spec.output[i])) return FXQ_QUANTIZER;
        const bool is_grid = spec.output[i].kind == FXQ_UNIFORM || spec.output[i].kind == FXQ_CODEBOOK;
        if (gives_codes && (!is_grid || !std::isfinite(spec.factor[i]))) return FXQ_QUANTIZER;
    }
    return FXQ_OK;
}

// Whether every byte has its code: each lies among those it stands for, which follow those of the code before.
static bool is_codebook(const FxqQuantizer &q) {
    if (q.codes < 1 || q.codes > FXQ_MAX_CODES || !is_byte(q.zero) || q.low != 0 || q.high != 255) return false;
    for (int32_t k = 0; k < q.codes; ++k)
        if (q.code[k] > q.below[k] || (k && q.code[k] <= q.below[k - 1])) return false;
    return q.below[q.codes - 1] == 255;
}

bool is_quantizer(const FxqQuantizer &q) {
    if (!is_positive(q.scale) || !is_positive(1.0f / q.scale)) return false;
    if (q.kind == FXQ_CODEBOOK) return is_codebook(q);
    if (q.codes) return false;
    if (q.kind == FXQ_UNIFORM) return is_byte(q.zero) && is_byte(q.low) && is_byte(q.high) && q.low <= q.high;
    if (q.kind == FXQ_REGIONS)
        return q.bits >= 2 && q.bits <= 8 && 0 <= q.shift_small && q.shift_small <= q.shift_large &&
               q.shift_large <= 24 && (q.negative == 0 || q.negative == 1);
    return q.kind == FXQ_LOG2 && q.bits >= 2 && q.bits <= 4;
}

static bool is_softmax(const FxqQuantizer &q, const FxqLevels &levels) {
    if (!are_levels(levels)) return false;
    if (q.kind != FXQ_ROW_LOG) return q.kind != FXQ_CODEBOOK && is_quantizer(q);
    return q.bits >= 2 && q.bits <= 8 && is_positive(q.scale) && is_positive(1.0f / q.scale) && q.codes == 0 &&
           levels.count == 1 && !levels.identity && levels.zero == 0;
}

int32_t check(const FxqAttention &spec) {
    if (!is_size(spec.heads, 1 << 16) || !is_size(spec.head_size, FXQ_MAX_INNER)) return FXQ_SIZE;
    for (const int32_t zero : spec.zero)
        if (!is_byte(zero)) return FXQ_QUANTIZER;
    return is_positive(spec.score_scale) && is_positive(spec.value_scale) &&
                   is_softmax(spec.softmax, spec.softmax_levels) && is_quantizer(spec.output)
               ? FXQ_OK
               : FXQ_QUANTIZER;
}

int32_t open_linear(const uint8_t *layout, int64_t bytes, FxqLinear *spec) {
    LinearHeader header;
    if (bytes < static_cast<int64_t>(sizeof header)) return FXQ_LAYOUT;
    std::memcpy(&header, layout, sizeof header);  // a copy: nobody changes it between check and use
    if (header.magic != kMagic || header.version != kVersion || check(header.spec) != FXQ_OK) return FXQ_LAYOUT;
    if (bytes != LinearPlaces(header.spec).total || reinterpret_cast<uintptr_t>(layout) % 4) return FXQ_LAYOUT;
    *spec = header.spec;
    return FXQ_OK;
}

bool run_linear(const LinearCall &call, int32_t threads) {
    if (call.rows == 0) return true;
    LinearWork work{call, 0, 0, 0};
    work.split(threads);
    const int64_t row_blocks = (call.rows + work.block_rows - 1) / work.block_rows;
    return parallel(row_blocks * work.unit_blocks, threads, LinearWork::run, &work);
}

bool run_layer_norm(const LayerNormCall &call, int64_t rows, int32_t threads) {
    struct Work {
        LayerNormCall call;
        int64_t rows;
    } work{call, rows};
    static constexpr int64_t kBlock = 64;
    const auto run = [](void *self, int64_t index) {
        const Work &w = *static_cast<Work *>(self);
        kernels().layer_norm(w.call, index * kBlock, std::min<int64_t>(kBlock, w.rows - index * kBlock));
    };
    return parallel((rows + kBlock - 1) / kBlock, threads, run, &work);
}

// A task is a head, or some rows of one where there are few heads that threads cannot share out evenly: keys and values
// are then packed for each part again.
bool run_attention(const AttentionCall &call, int64_t batch, int32_t threads) {
    struct Work {
        const AttentionCall &call;
        int64_t parts, rows;
    } work{call, 1, call.tokens};
    const int64_t heads = batch * call.spec->heads;
    if (threads > 1 && heads < 4 * threads && call.tokens >= 64 * threads) {
        work.parts = threads / std::gcd(heads, int64_t(threads));
        work.rows = (call.tokens + work.parts - 1) / work.parts;
    }
    const auto run = [](void *self, int64_t index) {
        const Work &w = *static_cast<Work *>(self);
        const int64_t head = index / w.parts, row = index % w.parts * w.rows;
        kernels().attention(w.call, head / w.call.spec->heads, head % w.call.spec->heads, row,
                            std::min(row + w.rows, w.call.tokens));
    };
    return parallel(heads * work.parts, threads, run, &work);
}

}  // namespace fxq

using namespace fxq;

int32_t fxq_abi(void) { return FXQ_ABI; }

const char *fxq_message(int32_t status) {
    static const char *const kMessages[] = {
        "no error",
        "a pointer is missing",
        "a size is out of range, or a buffer does not have the length that the sizes imply",
        "weight bits are outside 2 to 8, or a code does not fit them",
        "a quantizer or its levels are malformed",
        "the layout is damaged, or of another version",
        "out of memory",
        "this CPU does not have that instruction set",
        "the file cannot be read",
        "this is no model of this version, or it is damaged",
    };
    return status >= 0 && status <= FXQ_PROGRAM ? kMessages[status] : "unknown error";
}

int32_t fxq_best(void) { return best(); }

const char *fxq_name(int32_t isa) { return isa >= 0 && isa < kSetCount ? kSets[isa].kernels->name : ""; }

int32_t fxq_runs(int32_t isa) { return isa >= 0 && isa < kSetCount && kSets[isa].is_there(); }

int32_t fxq_select(int32_t isa) {
    if (isa != -1 && !fxq_runs(isa)) return FXQ_UNSUPPORTED;
    selected = isa < 0 ? best() : isa;
    return FXQ_OK;
}

int32_t fxq_selected(void) { return selected; }

int32_t fxq_linear(const uint8_t *layout, int64_t layout_bytes, const uint8_t *codes, int64_t code_bytes, int64_t rows,
                   const float *residual, int64_t residual_bytes, void *out, int64_t out_bytes, int32_t threads) {
    if (!layout || !codes || !out) return FXQ_NULL;
    FxqLinear spec;
    if (const int32_t status = open_linear(layout, layout_bytes, &spec)) return status;
    const int64_t elements = product(rows, spec.out_features);
    const bool is_float = spec.epilogue == FXQ_FLOAT || spec.epilogue == FXQ_RESIDUAL;
    if (!holds(code_bytes, product(rows, spec.in_features), 1) || !holds(out_bytes, elements, is_float ? 4 : 1))
        return FXQ_SIZE;
    if (spec.epilogue == FXQ_RESIDUAL && !residual) return FXQ_NULL;
    if (residual_bytes != (spec.epilogue == FXQ_RESIDUAL ? elements * 4 : 0)) return FXQ_SIZE;
    const LinearCall call{&spec, LinearPlaces(spec), layout, codes, rows, residual, out};
    return done(run_linear(call, threads));
}

int32_t fxq_quantize(const FxqQuantizer *quantizer, const float *x, int64_t count, uint8_t *out, int64_t out_bytes,
                     int32_t threads) {
    if (!quantizer || !x || !out) return FXQ_NULL;
    if (!is_quantizer(*quantizer)) return FXQ_QUANTIZER;
    if (!holds(out_bytes, product(count), 1)) return FXQ_SIZE;
    struct Work {
        const FxqQuantizer *quantizer;
        const float *x;
        int64_t count;
        uint8_t *out;
    } work{quantizer, x, count, out};
    static constexpr int64_t kBlock = 1 << 15;
    const auto run = [](void *self, int64_t index) {
        const Work &w = *static_cast<Work *>(self);
        const int64_t first = index * kBlock;
        kernels().quantize(*w.quantizer, w.x + first, std::min<int64_t>(kBlock, w.count - first), w.out + first);
    };
    return done(parallel((count + kBlock - 1) / kBlock, threads, run, &work));
}

int32_t fxq_layer_norm(const FxqQuantizer *quantizer, const float *x, int64_t rows, int64_t channels,
                       const float *weight, const float *bias, float epsilon, uint8_t *out, int64_t out_bytes,
                       int32_t threads) {
    if (!quantizer || !x || !out) return FXQ_NULL;
    if (!is_quantizer(*quantizer) || !std::isfinite(epsilon) || epsilon < 0) return FXQ_QUANTIZER;
    if (!is_size(channels) || !holds(out_bytes, product(rows, channels), 1)) return FXQ_SIZE;
    return done(run_layer_norm({quantizer, x, weight, bias, channels, epsilon, out}, rows, threads));
}

int32_t fxq_matmul(const FxqLevels *left_levels, int32_t right_zero, float scale, const uint8_t *left,
                   int64_t left_bytes, const uint8_t *right, int64_t right_bytes, int32_t transposed, int64_t batch,
                   int64_t n, int64_t k, int64_t m, float *out, int64_t out_bytes, int32_t threads) {
    if (!left_levels || !left || !right || !out) return FXQ_NULL;
    if (!are_levels(*left_levels) || !is_byte(right_zero) || !is_positive(scale)) return FXQ_QUANTIZER;
    if (!is_size(n) || !is_size(k, FXQ_MAX_INNER) || !is_size(m)) return FXQ_SIZE;
    if (!holds(left_bytes, product(batch, n, k), 1) || !holds(right_bytes, product(batch, k, m), 1) ||
        !holds(out_bytes, product(batch, n, m), 4))
        return FXQ_SIZE;
    MatmulCall call{left_levels, right_zero, transposed, scale, left, right, n, k, m, out};
    const auto run = [](void *self, int64_t index) { kernels().matmul(*static_cast<MatmulCall *>(self), index); };
    return done(parallel(batch, threads, run, &call));
}

int32_t fxq_attention(const FxqAttention *spec, const uint8_t *qkv, int64_t qkv_bytes, int64_t batch, int64_t tokens,
                      const float *bias, int64_t bias_bytes, uint8_t *out, int64_t out_bytes, int32_t threads) {
    if (!spec || !qkv || !out) return FXQ_NULL;
    if (const int32_t status = check(*spec)) return status;
    if (!is_size(tokens, FXQ_MAX_INNER)) return FXQ_SIZE;
    const int64_t group_bytes = spec->heads * tokens * tokens * 4, bias_groups = bias ? bias_bytes / group_bytes : 0;
    if (bias_bytes != bias_groups * group_bytes || (bias && bias_groups < 1)) return FXQ_SIZE;
    const int64_t elements = product(batch, tokens, spec->heads, spec->head_size);
    if (!holds(out_bytes, elements, 1) || !holds(qkv_bytes, product(elements, 3), 1)) return FXQ_SIZE;
    return done(run_attention({spec, qkv, tokens, bias_groups, 0, bias, out}, batch, threads));
}
