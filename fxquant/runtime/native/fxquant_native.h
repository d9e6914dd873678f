// The C interface of the integer kernels: plain C types and caller-owned memory, nothing of libtorch's or Python's ABI.
//
// A "layout" is one block of bytes that holds everything about one layer (sizes, quantizers, packed weights, scales):
// position independent, so it can be copied and mapped at will. Whoever calls may be wrong or malicious: every function
// checks sizes, widths and lengths before it reads or writes, and returns an error code; no exception leaves.
//
// Codes are bytes. A uniform quantizer's byte is its code (plus 128 where it is signed), a regions quantizer's is the
// index of its level, a log2 quantizer's is the exponent, a row-log quantizer's is how far a value lies below its row's
// largest. A codebook's is a code of an 8-bit uniform quantizer, one of few. `FxqLevels` says which integer a byte stands
// for.
#ifndef FXQUANT_NATIVE_H
#define FXQUANT_NATIVE_H

#include <stdint.h>

#include "fxquant.h"

// A library of whole models alone keeps these functions to itself: its Makefile says so.
#if defined(FXQ_API)
#elif defined(_WIN32)
#define FXQ_API extern "C" __declspec(dllexport)
#else
#define FXQ_API extern "C" __attribute__((visibility("default")))
#endif

enum { FXQ_ABI = 9, FXQ_MAX_DIGITS = 3, FXQ_MAX_INNER = 32768, FXQ_MAX_STEPS = 8, FXQ_MAX_PARTS = 256, FXQ_TABLE_ENTRIES = 1 << 14 };
enum { FXQ_MAX_CODES = 32 };

// FXQ_ROW_LOG is for the softmax of an attention only, FXQ_CODEBOOK for everything else.
enum FxqKind { FXQ_UNIFORM = 0, FXQ_REGIONS = 1, FXQ_LOG2 = 2, FXQ_ROW_LOG = 3, FXQ_CODEBOOK = 4 };

// From a float to a byte.
struct FxqQuantizer {
    int32_t kind;
    float scale;                // finite, above zero; row-log: powers of two per code
    int32_t zero, low, high;    // uniform: bytes of zero, of the lowest and of the highest code; codebook: zero, 0, 255
    int32_t bits;               // regions, row-log: 2..8; log2: 2..4
    int32_t shift_small, shift_large, negative;  // regions, as ShiftedRegionsQuantizer has them
    int32_t codes;                               // codebook: 1 .. FXQ_MAX_CODES; others: 0
    uint8_t below[FXQ_MAX_CODES];  // codebook: the last byte that code k stands for; 255 for the last code
    uint8_t code[FXQ_MAX_CODES];   // codebook: ascending, each at most its `below` and above the one before
};

// From a byte to an integer: sum over digits of 256^i digit[i][byte], less zero; times `unit` it is a float value.
struct FxqLevels {
    int32_t count;     // 1 .. FXQ_MAX_DIGITS
    int32_t identity;  // 1: one digit, which is the byte itself
    int32_t zero;      // 0 .. 256^count - 1
    float unit;        // finite, above zero
    uint8_t digit[FXQ_MAX_DIGITS][256];
};

// What a linear layer does with y = T (weight_scale unit) + bias, T the integer sum.
enum FxqEpilogue {
    FXQ_FLOAT = 0,      // float32 y
    FXQ_RESIDUAL = 1,   // float32 residual + y
    FXQ_CODES = 2,      // bytes: y times a constant, then uniform or codebook; column range i has constant and quantizer i
    FXQ_GELU_CODES = 3, // bytes: quantizer 0 of gelu(y), the exact one
    FXQ_TABLE_CODES = 4 // bytes: the table's entry for round(y), limited to 0 .. FXQ_TABLE_ENTRIES - 1
};
enum { FXQ_MAX_RANGES = 3 };

struct FxqLinear {
    int64_t out_features, in_features;  // 1 .. 2^24, 1 .. FXQ_MAX_INNER
    int32_t weight_bits, epilogue;
    int32_t ranges;                     // FXQ_CODES: 1..3 equal column ranges; else 1
    int32_t steps;                      // FXQ_TABLE_CODES: 1..FXQ_MAX_STEPS; else 0
    float factor[FXQ_MAX_RANGES];       // FXQ_CODES: finite
    struct FxqQuantizer output[FXQ_MAX_RANGES];
    struct FxqLevels input;
};

// softmax(Q K^T score_scale) V of codes laid out (batch, tokens, 3, heads, head_size), then the output quantizer.
struct FxqAttention {
    int64_t heads, head_size;  // 1 .. 2^16 each; head_size at most FXQ_MAX_INNER
    int32_t zero[3];           // bytes of zero in q, k, v: 0..255
    float score_scale;         // value of one unit of the integer Q K^T
    float value_scale;         // value of one unit of v, times that of a softmax level; row-log levels are divided by their sum
    struct FxqQuantizer softmax;
    struct FxqLevels softmax_levels;
    struct FxqQuantizer output;
};

FXQ_API int32_t fxq_abi(void);
FXQ_API const char *fxq_message(int32_t status);

// Instruction sets by number, best last; which there are depends on the compiler, and their names say. Whether this CPU runs
// one: a better one does not always run where a worse one does. `fxq_select` takes one (or -1: the best) for the process.
FXQ_API int32_t fxq_best(void);
FXQ_API int32_t fxq_runs(int32_t isa);
FXQ_API const char *fxq_name(int32_t isa);
FXQ_API int32_t fxq_select(int32_t isa);
FXQ_API int32_t fxq_selected(void);

// Bytes of a linear layer's layout, 0 for a spec that is malformed.
FXQ_API int64_t fxq_linear_bytes(const struct FxqLinear *spec);

// codes: int8 (out, in), each within weight_bits. scale, bias: float32 (out,), finite; bias may be null.
// table: for FXQ_TABLE_CODES (1 + 2 steps, 64) bytes, else null. Entry 256 h + l is row 0 at h, or, for the last step i
// whose position, row 2 i + 1 at h, is at most l, row 2 i + 2 at h.
FXQ_API int32_t fxq_linear_pack(const struct FxqLinear *spec, const int8_t *codes, int64_t code_bytes,
                                const float *scale, const float *bias, int64_t vector_bytes, const uint8_t *table,
                                int64_t table_bytes, uint8_t *layout, int64_t layout_bytes);

// codes: (rows, in) bytes. residual: float32 (rows, out) for FXQ_RESIDUAL, else null. out: float32 or bytes (rows, out).
FXQ_API int32_t fxq_linear(const uint8_t *layout, int64_t layout_bytes, const uint8_t *codes, int64_t code_bytes,
                           int64_t rows, const float *residual, int64_t residual_bytes, void *out, int64_t out_bytes,
                           int32_t threads);

FXQ_API int32_t fxq_quantize(const struct FxqQuantizer *quantizer, const float *x, int64_t count, uint8_t *out,
                             int64_t out_bytes, int32_t threads);

// Bytes of quantizer(layer_norm(x) weight + bias). x: float32 (rows, channels); weight, bias: (channels,) or null.
FXQ_API int32_t fxq_layer_norm(const struct FxqQuantizer *quantizer, const float *x, int64_t rows, int64_t channels,
                               const float *weight, const float *bias, float epsilon, uint8_t *out, int64_t out_bytes,
                               int32_t threads);

// out (batch, n, m) = left (batch, n, k) right (batch, k, m), or right (batch, m, k) where `transposed`.
// right_zero: byte of zero, scale: value of one unit of the integer product (left unit times right scale).
FXQ_API int32_t fxq_matmul(const struct FxqLevels *left_levels, int32_t right_zero, float scale, const uint8_t *left,
                           int64_t left_bytes, const uint8_t *right, int64_t right_bytes, int32_t transposed,
                           int64_t batch, int64_t n, int64_t k, int64_t m, float *out, int64_t out_bytes,
                           int32_t threads);

// qkv: bytes (batch, tokens, 3, heads, head_size). bias: null, or float32 (groups, heads, tokens, tokens) added to the
// scores of image i from group i mod groups. out: bytes (batch, tokens, heads head_size).
FXQ_API int32_t fxq_attention(const struct FxqAttention *spec, const uint8_t *qkv, int64_t qkv_bytes, int64_t batch,
                              int64_t tokens, const float *bias, int64_t bias_bytes, uint8_t *out, int64_t out_bytes,
                              int32_t threads);

// out (batch, rows, columns, channels kernel_height kernel_width): the patches that a kernel sees of codes
// (batch, channels, height, width).
FXQ_API int32_t fxq_patches(const uint8_t *codes, int64_t code_bytes, int64_t batch, int64_t channels, int64_t height,
                            int64_t width, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                            int64_t stride_width, uint8_t *out, int64_t out_bytes, int32_t threads);

// out (batch, n + tokens, channels): first (n, channels), which may be null for none, then x (batch, tokens, channels)
// plus positions (tokens, channels).
FXQ_API int32_t fxq_tokens(const float *x, int64_t x_bytes, int64_t batch, int64_t tokens, int64_t channels,
                           const float *positions, int64_t position_bytes, const float *first, int64_t first_bytes,
                           float *out, int64_t out_bytes, int32_t threads);

// What stays in float beside the kernels, so that it rounds alike wherever it runs.
// out = layer_norm(x) weight + bias. x, out: float32 (rows, channels); weight, bias: (channels,) or null.
FXQ_API int32_t fxq_norm(const float *x, int64_t rows, int64_t channels, const float *weight, const float *bias,
                         float epsilon, float *out, int64_t out_bytes, int32_t threads);

// out (groups, channels): means of x (groups, rows, channels) over rows, summed in double precision.
FXQ_API int32_t fxq_mean(const float *x, int64_t groups, int64_t rows, int64_t channels, float *out, int64_t out_bytes,
                         int32_t threads);

// A chain is a block of bytes too: FxqChain, `count` FxqSteps, then what their offsets point to (multiples of 64).
// Values are rows of float32 or bytes, one row a token: value 0 is the input, value i + 1 the result of step i.
enum FxqStepKind { FXQ_LAYER_NORM = 0, FXQ_LINEAR = 1, FXQ_ATTENTION = 2 };

struct FxqChain {
    uint32_t magic, version;
    int64_t count;     // steps, 1 .. 4096
    int64_t channels;  // of value 0, float32
    // Where value 0 has its rows from. order: offset of int32 (order_rows,), the rows of one image of x one after the
    // other, each once; 0 and no rows: as they lie. parts: rows of x that are side by side in one row of value 0, 1 .. FXQ_MAX_PARTS.
    // returns: 1, the result's rows go back to where those of value 0 came from (parts is 1 then); else 0.
    int64_t order, order_rows, parts, returns;
};

struct FxqStep {
    int32_t kind, input, residual;  // numbers of values; residual: of a linear layer with FXQ_RESIDUAL, else 0
    float epsilon;                  // layer norm
    int64_t offset, bytes;          // of the layer's layout, the norm's FxqQuantizer or the FxqAttention
    int64_t weight, bias;           // offsets of the norm's (channels,), or of the attention's bias; 0: none
    int64_t bias_groups;            // attention: groups of its bias (groups, heads, tokens, tokens); 0: none
    int64_t bias_bytes;             // attention: length of that bias; others: 0
};
enum { FXQ_CHAIN_MAGIC = 0x43515846 };

// Runs all steps on a few images at a time, which stay in the cache. x: float32 (images, tokens, channels). out: what
// the last step gives, float32 or bytes. With an order, what counts as an image here are `tokens` rows of value 0, for
// example a window, of which x has a whole number in each image.
FXQ_API int32_t fxq_chain(const uint8_t *chain, int64_t chain_bytes, int64_t images, int64_t tokens, const float *x,
                          int64_t x_bytes, void *out, int64_t out_bytes, int32_t threads);

#endif
