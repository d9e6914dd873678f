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
struct Table {
    float numbers[32];
};
static FXQ_INLINE Table scaled(const float *table, float factor) {  // 32 numbers times a factor
    Table result;
    for (int i = 0; i < 32; ++i) result.numbers[i] = table[i] * factor;
    return result;
}
static FXQ_INLINE Vec entry(const Table &table, Whole index) { return table.numbers[index]; }

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

// Sixteen partial sums, and their sum in the order that all sets keep.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

static FXQ_INLINE float sum_of(const Lanes &lanes) {
    float total[8];
    for (int i = 0; i < 8; ++i) total[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) total[i] += total[i + 4];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// Of 32 partial sums.
static FXQ_INLINE float sum_of(const Vec *sums) {
    return sum_of(*reinterpret_cast<const Lanes *>(sums) + *reinterpret_cast<const Lanes *>(sums + 16));
}

// Sum of (x - center)^power.
template <int power>
static float sum(const float *x, int64_t count, float center) {
    Lanes sums[4] = {};
    int64_t i = 0;
    const auto add = [&](Lanes *to, int64_t at) {
        const Lanes difference = *reinterpret_cast<const Lanes *>(x + at) - center;
        *to += power == 2 ? difference * difference : difference;
    };
    for (; i + 64 <= count; i += 64)
        for (int part = 0; part < 4; ++part) add(sums + part, i + part * 16);
    for (; i + 16 <= count; i += 16) add(sums, i);
    if (i < count) {
        float rest[16];
        for (int lane = 0; lane < 16; ++lane) rest[lane] = i + lane < count ? x[i + lane] : center;
        x = rest, add(sums, 0);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Of 32 numbers.
static FXQ_INLINE float largest_of(const Vec *x) {
    float most = x[0];
    for (int i = 1; i < 32; ++i) most = larger(x[i], most);
    return most;
}

static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, Left *out) {
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

// The codes of a codebook, vectors at a time: the first, plus what every threshold below a byte adds. Bytes are compared
// less 128, as signed ones.
typedef int8_t SignedBytes __attribute__((vector_size(kRegisterBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kRegisterBytes)));

struct Codebook {
    SignedBytes below[FXQ_MAX_CODES - 1];
    Bytes rise[FXQ_MAX_CODES - 1], first;
    int steps;
    explicit Codebook(const FxqQuantizer &q) : first(Bytes{} + q.code[0]), steps(q.codes - 1) {
        for (int k = 0; k < steps; ++k) {
            below[k] = SignedBytes{} + static_cast<int8_t>(q.below[k] ^ 128);
            rise[k] = Bytes{} + static_cast<uint8_t>(q.code[k + 1] - q.code[k]);
        }
    }
    template <int vectors>
    FXQ_INLINE void snap_vectors(uint8_t *bytes) const {
        SignedBytes x[vectors];
        Bytes sum[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            __builtin_memcpy(&x[v], bytes + v * kRegisterBytes, kRegisterBytes);
            x[v] ^= static_cast<int8_t>(-128), sum[v] = first;
        }
        for (int k = 0; k < steps; ++k) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[v] += reinterpret_cast<Bytes>(x[v] > below[k]) & rise[k];
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) __builtin_memcpy(bytes + v * kRegisterBytes, &sum[v], kRegisterBytes);
    }
    void snap(uint8_t *bytes, int64_t count) const {
        for (; count >= 4 * kRegisterBytes; bytes += 4 * kRegisterBytes, count -= 4 * kRegisterBytes) snap_vectors<4>(bytes);
        for (; count >= kRegisterBytes; bytes += kRegisterBytes, count -= kRegisterBytes) snap_vectors<1>(bytes);
        if (count == 0) return;
        uint8_t rest[kRegisterBytes] = {};
        __builtin_memcpy(rest, bytes, static_cast<size_t>(count));
        snap_vectors<1>(rest);
        __builtin_memcpy(bytes, rest, static_cast<size_t>(count));
    }
};

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
