// Vectors of one float: loops over them are the compiler's to turn into whatever the including file may use.

using Vec = float;
using Whole = uint32_t;
constexpr int kLanes = 1;

static FXQ_INLINE Vec splat(float x) { return x; }
static FXQ_INLINE Whole splat(uint32_t x) { return x; }
static FXQ_INLINE Vec load(const float *from, int64_t) { return *from; }
static FXQ_INLINE Whole load(const int32_t *from, int64_t) { return static_cast<uint32_t>(*from); }
static FXQ_INLINE void store(Vec x, float *to, int64_t) { *to = x; }
static FXQ_INLINE void store_bytes(Whole x, uint8_t *to, int64_t) { *to = static_cast<uint8_t>(x); }
static FXQ_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is no number
static FXQ_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static FXQ_INLINE Vec size_of(Vec a) { return __builtin_fabsf(a); }
static FXQ_INLINE Vec fused(Vec a, Vec b, Vec c) { return __builtin_fmaf(a, b, c); }
static FXQ_INLINE Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) { return a < b ? then : otherwise; }
static FXQ_INLINE Vec only(Vec x, int64_t, float) { return x; }
static FXQ_INLINE Vec to_float(Whole x) { return static_cast<float>(static_cast<int32_t>(x)); }
// The coefficients of GELU's pieces, times a factor.
struct Pieces {
    float numbers[kGeluDegree + 1][kGeluPieces];
    explicit Pieces(float factor) {
        for (int k = 0; k <= kGeluDegree; ++k)
            for (int i = 0; i < kGeluPieces; ++i) numbers[k][i] = gelu_table[k][i] * factor;
    }
    FXQ_INLINE void take(Whole piece, Vec *coefficients) const {
        for (int k = 0; k <= kGeluDegree; ++k) coefficients[k] = numbers[k][piece];
    }
};

static FXQ_INLINE Whole bits_of(Vec x) {
    Whole bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

static FXQ_INLINE Vec float_of(Whole bits) {
    Vec x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// The integer that a float which was rounded by adding holds, below the pieces of GELU's table.
static FXQ_INLINE Whole piece_of(Vec sum) { return bits_of(sum) & (kGeluPieces - 1); }

// Of 32 numbers.
static FXQ_INLINE float largest_of(const Vec *x) {
    float most = x[0];
    for (int i = 1; i < 32; ++i) most = larger(x[i], most);
    return most;
}

static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, uint8_t *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = table[codes[i]];
}

// The table's entries for rounded numbers, limited to its size.
template <int count>
static FXQ_INLINE void table_bytes(const uint8_t *table, int steps, const Vec *x, uint8_t *out) {
    for (int i = 0; i < count; ++i) {
        const Vec y = smaller(x[i], float(FXQ_TABLE_ENTRIES - 1));
        const int32_t entry = static_cast<int32_t>(__builtin_rintf(larger(y, 0.0f)));
        const uint8_t *at = table + (entry >> 8);
        uint8_t byte = at[0];
        for (int step = 0; step < steps; ++step)
            if ((entry & 255) >= at[(2 * step + 1) * kTableRow]) byte = at[(2 * step + 2) * kTableRow];
        out[i] = byte;
    }
}

// Bytes less `middle` as units of 16 columns, and their sums; padding is zero. Element (k, column) lies at
// source[column * stride + k] where `transposed`, else at source[k * stride + column].
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int32_t middle, int64_t unit_elements, Right *numbers, int32_t *column_sum) {
    for (int64_t u = 0; u * 16 < columns; ++u, numbers += unit_elements) {
        const int64_t width = columns - u * 16 < 16 ? columns - u * 16 : 16;
        int32_t sums[16] = {};
        for (int64_t i = 0; i < unit_elements; ++i) numbers[i] = 0;
        for (int64_t k = 0; k < inner; ++k) {
            Right *to = numbers + k / 4 * kGroupBytes + k % 4;
            for (int64_t c = 0; c < width; ++c) {
                const uint8_t byte = transposed ? source[(u * 16 + c) * stride + k] : source[k * stride + u * 16 + c];
                to[c * 4] = static_cast<int8_t>(byte - middle);
                sums[c] += to[c * 4];
            }
        }
        __builtin_memcpy(column_sum + u * 16, sums, sizeof sums);
    }
}
