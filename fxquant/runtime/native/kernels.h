// What the parts of the library share: the layout of a linear layer, the table of kernels of one instruction set, and
// the thread pool. Everything here is validated already; only entry.cpp sees unchecked values.
#ifndef FXQUANT_KERNELS_H
#define FXQUANT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include <cmath>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include "fxquant_native.h"

#if defined(__GNUC__)
#define FXQ_INLINE inline __attribute__((always_inline))
#define FXQ_ALWAYS __attribute__((always_inline))  // of lambdas
#define FXQ_APART __attribute__((noinline))        // what is called rarely: compiled once
#else
#define FXQ_INLINE inline
#define FXQ_ALWAYS
#define FXQ_APART
#endif

namespace fxq {

// Weights: units of 16 output channels; in a unit, tiles of 32 inputs; in a tile, 8 groups of [16 channels][4 inputs].
// A tile of b bits is b 64-byte lines: bit planes of 4, 2 and 1 bits as b says; 8 bits are plain bytes.
constexpr int64_t kUnit = 16, kTileInputs = 32, kGroups = 8, kGroupBytes = 64, kPanelColumns = 64;
constexpr int64_t kTableRow = FXQ_TABLE_ENTRIES / 256;

struct LinearHeader {
    uint32_t magic, version;
    FxqLinear spec;
};
constexpr uint32_t kMagic = 0x4c515846, kVersion = 6;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Where the parts of a layout lie, in bytes from its start. Vectors are float32 or int32, one number per column, and
// padded to whole panels.
struct LinearPlaces {
    int64_t units, tiles, vector, weights, scale, bias, weight_sum, columns, table, table_bytes, total;
    explicit LinearPlaces(const FxqLinear &spec)
        : units((spec.out_features + kUnit - 1) / kUnit), tiles((spec.in_features + kTileInputs - 1) / kTileInputs),
          vector(round_up(spec.out_features, kPanelColumns) * 4) {
        weights = round_up(sizeof(LinearHeader), 64);
        scale = weights + units * tiles * 64 * spec.weight_bits;
        bias = scale + vector;
        weight_sum = bias + vector;
        columns = weight_sum + vector;  // FXQ_CODES, of each column: low and high less zero, int32 zero
        table = columns + (spec.epilogue == FXQ_CODES ? 3 * vector : 0);
        table_bytes = spec.epilogue == FXQ_TABLE_CODES ? (1 + 2 * spec.steps) * kTableRow : 0;
        total = table + table_bytes;
    }
};

struct LinearCall {
    const FxqLinear *spec;
    LinearPlaces places;
    const uint8_t *layout, *codes;
    int64_t rows;
    const float *residual;
    void *out;
    bool is_wide = false;  // no int32 holds the sums of all digits; kernels say so
};

struct MatmulCall {
    const FxqLevels *left_levels;
    int32_t right_zero, transposed;
    float scale;
    const uint8_t *left, *right;
    int64_t n, k, m;
    float *out;
};

struct AttentionCall {
    const FxqAttention *spec;
    const uint8_t *qkv;
    int64_t tokens, bias_groups, first_group;  // image i takes bias group (first_group + i) mod bias_groups
    const float *bias;
    uint8_t *out;
};

struct LayerNormCall {
    const FxqQuantizer *quantizer;
    const float *x, *weight, *bias;
    int64_t channels;
    float epsilon;
    uint8_t *out;
};

// Row i: coefficients of t^i of the pieces' polynomials, t in steps; see `ScaledGelu` in elementwise.inl.
constexpr int kGeluPieces = 32, kGeluDegree = 3;
constexpr float kGeluStep = 0.1875f;
extern float gelu_table[kGeluDegree + 1][kGeluPieces];

// The kernels of one instruction set. All sets give the same bytes and the same floats, bit for bit.
struct Kernels {
    const char *name;
    void (*linear)(const LinearCall &, int64_t row, int64_t rows, int64_t unit, int64_t units);
    void (*matmul)(const MatmulCall &, int64_t batch);
    void (*attention)(const AttentionCall &, int64_t batch, int64_t head, int64_t row, int64_t end);
    void (*layer_norm)(const LayerNormCall &, int64_t row, int64_t rows);
    void (*quantize)(const FxqQuantizer &, const float *x, int64_t count, uint8_t *out);
};

// A further set joins by a file with its own `tile` that includes layers.inl behind it, and a line in entry.cpp.
extern const Kernels kScalar;
// FXQ_PORTABLE, FXQ_AVX2_ONLY: a small library leaves sets out, see Makefile.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(FXQ_PORTABLE)
#define FXQ_X86 1
extern const Kernels kAvx2;
bool has_avx2();
#if !defined(FXQ_AVX2_ONLY)
#define FXQ_AVX512 1
extern const Kernels kAvx512Vnni;
bool has_avx512_vnni();
#if __GNUC__ >= 11 || (defined(__clang__) && __clang_major__ >= 12)
#define FXQ_AVX_VNNI 1
extern const Kernels kAvxVnni;
bool has_avx_vnni();
#if defined(__linux__)
#define FXQ_AMX 1
extern const Kernels kAmxInt8;
bool has_amx();
#endif
#endif
#endif
#endif

#if defined(__aarch64__) && defined(__GNUC__) && !defined(FXQ_PORTABLE)
#define FXQ_NEON 1
extern const Kernels kNeon;
// Compilers whose header has the further instructions whatever the rest of a file is compiled for.
#if !defined(__clang__) || (defined(__apple_build_version__) ? __clang_major__ >= 15 : __clang_major__ >= 16)
#define FXQ_NEON_EXTENSIONS 1
extern const Kernels kNeonDotprod, kNeonI8mm;
bool has_neon_dotprod();
bool has_neon_i8mm();
#endif
#endif

constexpr int64_t kMaxSize = int64_t(1) << 24, kMaxElements = int64_t(1) << 40;

inline bool is_size(int64_t n, int64_t most = kMaxSize) { return n >= 1 && n <= most; }
inline bool is_positive(float x) { return std::isfinite(x) && x > 0; }
inline bool is_byte(int32_t n) { return n >= 0 && n <= 255; }

// a * b * ... where no factor is negative, or -1 beyond kMaxElements.
template <class... Sizes>
int64_t product(Sizes... sizes) {
    int64_t total = 1;
    for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
        if (size < 0 || size > kMaxElements || (size && total > kMaxElements / size)) return -1;
        total *= size;
    }
    return total;
}

// Whether a buffer of `bytes` bytes holds exactly these elements.
inline bool holds(int64_t bytes, int64_t elements, int64_t element_bytes) {
    return elements >= 0 && bytes == elements * element_bytes;
}

// Whether what a stranger's bytes say makes sense; `open_linear` copies what it has checked.
bool is_quantizer(const FxqQuantizer &quantizer);
bool are_levels(const FxqLevels &levels);
int32_t check(const FxqLinear &spec);
int32_t check(const FxqAttention &spec);
int32_t open_linear(const uint8_t *layout, int64_t bytes, FxqLinear *spec);

// What a chain reads and gives: elements of a row, bytes of an element of its result. FxqStatus of what does not fit.
struct ChainRows {
    int64_t channels, width, element_bytes;
};
int32_t check_chain(const uint8_t *chain, int64_t bytes, int64_t images, int64_t tokens, ChainRows *found);

// A call that was checked, on threads; false without memory.
bool run_linear(const LinearCall &call, int32_t threads);
bool run_layer_norm(const LayerNormCall &call, int64_t rows, int32_t threads);
bool run_attention(const AttentionCall &call, int64_t batch, int32_t threads);

// Runs task(context, i) for every i below count, on `threads` threads including the caller's; false without memory.
bool parallel(int64_t count, int32_t threads, void (*task)(void *, int64_t), void *context);

// This thread's scratch memory number `slot`, at least `bytes` long, 64-byte aligned; throws std::bad_alloc.
enum Slot { kPanel, kLeft, kSums, kScores, kSecondPanel, kWidened, kExtra, kChain, kSlots };
void *scratch(Slot slot, size_t bytes);

}  // namespace fxq

#endif
