// Vectors of one float: loops over them are the compiler's to turn into whatever the including file may use.

using Vec = float;
using Whole = uint32_t;
constexpr int kLanes = 1;

static inline Vec splat(float x) { return x; }
static inline Vec load(const float *from, int64_t) { return *from; }
static inline Whole load(const int32_t *from, int64_t) { return static_cast<uint32_t>(*from); }
static inline void store(Vec x, float *to, int64_t) { *to = x; }
static inline void store_bytes(Whole x, uint8_t *to, int64_t) { *to = static_cast<uint8_t>(x); }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is no number
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec fused(Vec a, Vec b, Vec c) { return __builtin_fmaf(a, b, c); }
static inline Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) { return a < b ? then : otherwise; }
static inline Vec to_float(Whole x) { return static_cast<float>(static_cast<int32_t>(x)); }
static inline Vec entry(const float *table, Whole index) { return table[index]; }

static inline Whole bits_of(Vec x) {
    Whole bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

static inline Vec float_of(Whole bits) {
    Vec x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, Left *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = table[codes[i]];
}

// Bytes less 128 as units of 16 columns, and their sums; padding is zero. Element (k, column) lies at
// source[column * stride + k] where `transposed`, else at source[k * stride + column].
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int64_t unit_elements, Right *numbers, int32_t *column_sum) {
    for (int64_t u = 0; u * 16 < columns; ++u, numbers += unit_elements) {
        const int64_t width = columns - u * 16 < 16 ? columns - u * 16 : 16;
        int32_t sums[16] = {};
        for (int64_t i = 0; i < unit_elements; ++i) numbers[i] = 0;
        for (int64_t k = 0; k < inner; ++k) {
            Right *to = numbers + k / 4 * kGroupBytes + k % 4;
            for (int64_t c = 0; c < width; ++c) {
                const uint8_t byte = transposed ? source[(u * 16 + c) * stride + k] : source[k * stride + u * 16 + c];
                to[c * 4] = static_cast<int8_t>(byte ^ 128);
                sums[c] += to[c * 4];
            }
        }
        __builtin_memcpy(column_sum + u * 16, sums, sizeof sums);
    }
}
