// The linear layer: packed weights are unpacked panel by panel, multiplied tile by tile, and finished while in cache.

constexpr int kTileColumns = kMaxVectors * kUnit;

// Tiles of `bits`-bit codes, as signed numbers: 8 groups of 64 each.
template <int bits>
static void unpack_tiles(const uint8_t *__restrict packed, int64_t tiles, Right *__restrict out) {
    constexpr int middle = 1 << (bits - 1);
    for (int64_t t = 0; t < tiles; ++t, packed += 64 * bits, out += kGroups * kGroupBytes) {
        if (bits == 8) {
            for (int i = 0; i < 512; ++i) out[i] = static_cast<int8_t>(packed[i]);
            continue;
        }
        const uint8_t *four = packed, *two = four + (bits & 4 ? 256 : 0), *one = two + (bits & 2 ? 128 : 0);
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) {
            for (int i = 0; i < 64; ++i) {
                uint8_t code = 0;
                if (bits & 4) code = (four[g / 2 * 64 + i] >> (g % 2 * 4)) & 15;
                if (bits & 2) code |= ((two[g / 4 * 64 + i] >> (g % 4 * 2)) & 3) << (bits & 4 ? 4 : 0);
                if (bits & 1) code |= ((one[i] >> g) & 1) << (bits & 6);
                out[g * 64 + i] = static_cast<int8_t>((code ^ middle) - middle);
            }
        }
    }
}

static void unpack(int32_t bits, const uint8_t *packed, int64_t tiles, Right *out) {
    switch (bits) {
        case 2: return unpack_tiles<2>(packed, tiles, out);
        case 3: return unpack_tiles<3>(packed, tiles, out);
        case 4: return unpack_tiles<4>(packed, tiles, out);
        case 5: return unpack_tiles<5>(packed, tiles, out);
        case 6: return unpack_tiles<6>(packed, tiles, out);
        case 7: return unpack_tiles<7>(packed, tiles, out);
        default: return unpack_tiles<8>(packed, tiles, out);
    }
}

// Rows of bytes as rows of one digit each, padded with zeros to whole groups: (rows, padded).
static void expand(const FxqLevels &levels, int digit, const uint8_t *codes, int64_t stride, int64_t rows, int64_t inner,
                   int64_t padded, Left *__restrict out) {
    for (int64_t r = 0; r < rows; ++r, codes += stride, out += padded) {
        if (levels.identity)
            for (int64_t k = 0; k < inner; ++k) out[k] = codes[k];
        else
            look_up(levels.digit[digit], codes, inner, out);
        for (int64_t k = inner; k < padded; ++k) out[k] = 0;
    }
}

// How the digits' sums make one number: there is one digit; int32 holds the result; it does not.
enum Sum { kOneDigit, kNarrow, kWide };

static Sum sum_kind(const FxqLinear &spec) {
    const FxqLevels &levels = spec.input;
    if (levels.count == 1) return kOneDigit;
    int64_t most = 0;
    for (int b = 0; b < 256; ++b) {
        int64_t level = -int64_t(levels.zero);
        for (int d = 0; d < levels.count; ++d) level += int64_t(levels.digit[d][b]) << (8 * d);
        most = level > most ? level : -level > most ? -level : most;
    }
    return most * spec.in_features << (spec.weight_bits - 1) < int64_t(1) << 31 ? kNarrow : kWide;
}

// sums: int32 (digits, kTileRows, kTileColumns). The integer result of one element, as a float.
template <Sum sum>
static inline float total(const int32_t *sums, int i, int32_t weight_sum, const FxqLevels &levels) {
    constexpr int plane = kTileRows * kTileColumns;
    if (sum == kWide) {
        double value = double(sums[i]) + 256.0 * double(sums[plane + i]);
        if (levels.count == 3) value += 65536.0 * double(sums[2 * plane + i]);
        return float(value - double(weight_sum) * double(levels.zero));
    }
    // Unsigned: a damaged layout may hold any sum, and wrapping round is defined for unsigned numbers only.
    uint32_t value = uint32_t(sums[i]) - uint32_t(weight_sum) * uint32_t(levels.zero);
    if (sum == kNarrow) {
        value += uint32_t(sums[plane + i]) << 8;
        if (levels.count == 3) value += uint32_t(sums[2 * plane + i]) << 16;
    }
    return float(static_cast<int32_t>(value));
}

struct Columns {  // one panel's part of the vectors in a layout
    const float *scale, *bias, *factor, *inverse, *zero, *low, *high;
    const int32_t *weight_sum;
    int64_t first;
    int count;
    Columns(const LinearCall &call, int64_t unit, int vectors) : first(unit * kUnit) {
        const auto at = [&](int64_t place) { return call.layout + place + first * 4; };
        const int64_t vector = call.places.vector, columns = call.places.columns;
        scale = reinterpret_cast<const float *>(at(call.places.scale));
        bias = reinterpret_cast<const float *>(at(call.places.bias));
        weight_sum = reinterpret_cast<const int32_t *>(at(call.places.weight_sum));
        factor = reinterpret_cast<const float *>(at(columns));
        inverse = reinterpret_cast<const float *>(at(columns + vector));
        zero = reinterpret_cast<const float *>(at(columns + 2 * vector));
        low = reinterpret_cast<const float *>(at(columns + 3 * vector));
        high = reinterpret_cast<const float *>(at(columns + 4 * vector));
        const int64_t left = call.spec->out_features - first;
        count = static_cast<int>(left < vectors * kUnit ? left : vectors * kUnit);
    }
};

template <Sum sum>
static void finish_float(const LinearCall &call, const Columns &c, const int32_t *sums, int rows, int64_t row) {
    const FxqLevels &levels = call.spec->input;
    const float *__restrict scale = c.scale, *__restrict bias = c.bias;
    const int32_t *__restrict weight_sum = c.weight_sum;
    for (int r = 0; r < rows; ++r, sums += kTileColumns) {
        const int64_t place = (row + r) * call.spec->out_features + c.first;
        float *out = static_cast<float *>(call.out) + place;
        if (call.spec->epilogue == FXQ_RESIDUAL) {
            const float *residual = call.residual + place;
            for (int i = 0; i < c.count; ++i)
                out[i] = residual[i] + (total<sum>(sums, i, weight_sum[i], levels) * scale[i] + bias[i]);
        } else {
            for (int i = 0; i < c.count; ++i) out[i] = total<sum>(sums, i, weight_sum[i], levels) * scale[i] + bias[i];
        }
    }
}

// Whole panels are computed, and as many bytes stored as there are columns: loops of constant length make good code.
// Panels begin at multiples of their width, so what is read beyond the last column is padding of the layout's vectors.
constexpr int kWidth = kMaxVectors * kUnit;

static inline void store(const uint8_t *bytes, uint8_t *out, int count) {
    if (count == kWidth) __builtin_memcpy(out, bytes, kWidth);
    else __builtin_memcpy(out, bytes, static_cast<size_t>(count));
}

template <Sum sum>
static void finish_codes(const LinearCall &call, const Columns &c, const int32_t *sums, int rows, int64_t row) {
    const FxqLevels &levels = call.spec->input;
    const float *scale = c.scale, *bias = c.bias, *factor = c.factor, *inverse = c.inverse, *zero = c.zero;
    const float *low = c.low, *high = c.high;
    alignas(64) uint8_t bytes[kWidth];
    for (int r = 0; r < rows; ++r, sums += kTileColumns) {
        for (int i = 0; i < kWidth; ++i) {
            const float y = total<sum>(sums, i, c.weight_sum[i], levels) * scale[i] + bias[i];
            bytes[i] = uniform_byte(y * factor[i], inverse[i], zero[i], low[i], high[i]);
        }
        store(bytes, static_cast<uint8_t *>(call.out) + (row + r) * call.spec->out_features + c.first, c.count);
    }
}

template <Sum sum, class Bytes>
static void finish_gelu(const LinearCall &call, const Columns &c, const int32_t *sums, int rows, int64_t row) {
    const Bytes to_byte(call.spec->output[0]);
    const FxqLevels &levels = call.spec->input;
    const float *scale = c.scale, *bias = c.bias;
    alignas(64) uint8_t bytes[kWidth];
    for (int r = 0; r < rows; ++r, sums += kTileColumns) {
        for (int i = 0; i < kWidth; ++i)
            bytes[i] = to_byte(gelu(total<sum>(sums, i, c.weight_sum[i], levels) * scale[i] + bias[i]));
        store(bytes, static_cast<uint8_t *>(call.out) + (row + r) * call.spec->out_features + c.first, c.count);
    }
}

typedef void (*Finish)(const LinearCall &, const Columns &, const int32_t *, int, int64_t);

template <Sum sum>
static Finish finish_of(const FxqLinear &spec) {
    if (spec.epilogue == FXQ_CODES) return finish_codes<sum>;
    if (spec.epilogue != FXQ_GELU_CODES) return finish_float<sum>;
    if (spec.output[0].kind == FXQ_UNIFORM) return finish_gelu<sum, UniformBytes>;
    return spec.output[0].kind == FXQ_REGIONS ? finish_gelu<sum, RegionBytes> : finish_gelu<sum, Log2Bytes>;
}

static Finish finish_of(const FxqLinear &spec) {
    switch (sum_kind(spec)) {
        case kOneDigit: return finish_of<kOneDigit>(spec);
        case kNarrow: return finish_of<kNarrow>(spec);
        default: return finish_of<kWide>(spec);
    }
}

static void linear(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    [[maybe_unused]] const Session session;
    const FxqLinear &spec = *call.spec;
    const int64_t inner = spec.in_features, padded = round_up(inner, kInnerStep), tiles = call.places.tiles;
    const int64_t unit_bytes = tiles * 64 * spec.weight_bits;
    const int digits = spec.input.count;
    // Bytes are used where they lie if they are digits already, rows are whole groups and tiles are whole.
    const bool is_direct = sizeof(Left) == 1 && spec.input.identity && inner == padded;
    const int64_t last = is_direct ? rows / kWholeRows * kWholeRows : 0, others = rows - last;
    Left *copied = nullptr;  // the rows from `last` on
    if (others) {
        const int64_t room = round_up(others, kWholeRows);
        copied = static_cast<Left *>(scratch(kLeft, size_t((digits - 1) * others + room) * size_t(padded) * sizeof(Left)));
        for (int d = 0; d < digits; ++d)
            expand(spec.input, d, call.codes + (row + last) * inner, inner, others, inner, padded, copied + d * others * padded);
    }
    const Left *left = reinterpret_cast<const Left *>(call.codes + row * inner);
    const bool is_plain = sizeof(Right) == 1 && spec.weight_bits == 8 && inner == padded;
    const int64_t unit_elements = is_plain ? tiles * kGroups * kGroupBytes : round_up(tiles * kTileInputs, kInnerStep) * kUnit;
    Right *panel = is_plain ? nullptr
                            : static_cast<Right *>(scratch(kPanel, size_t(kMaxVectors * unit_elements) * sizeof(Right)));
    const Finish finish = finish_of(spec);
    // Each tile is finished while the next is multiplied.
    alignas(64) int32_t sums[2][FXQ_MAX_DIGITS * kTileRows * kTileColumns] = {};
    int current = 0, count = 0;
    int64_t first = 0;
    Columns before(call, unit, 1);
    for (int64_t u = unit; u < unit + units;) {
        const int vectors = vectors_for(unit + units - u), step = rows_for(vectors);
        const uint8_t *packed = call.layout + call.places.weights + u * unit_bytes;
        for (int v = 0; v < vectors && !is_plain; ++v)
            unpack(spec.weight_bits, packed + v * unit_bytes, tiles, panel + v * unit_elements);
        const Right *right = is_plain ? reinterpret_cast<const Right *>(packed) : panel;
        const Columns columns(call, u, vectors);
        for (int64_t r = 0; r < rows;) {
            const int64_t left_over = (r < last ? last : rows) - r;
            const Left *from = r < last ? left + r * padded : copied + (r - last) * padded;
            const int next = static_cast<int>(left_over < step ? left_over : step);
            for (int d = 0; d < digits; ++d)
                tile(next, vectors, from + d * others * padded, padded, right, unit_elements, padded / 4,
                     sums[current] + d * kTileRows * kTileColumns, kTileColumns);
            if (count) finish(call, before, sums[current ^ 1], count, first);
            before = columns, count = next, first = row + r, current ^= 1, r += next;
        }
        u += vectors;
    }
    finish(call, before, sums[current ^ 1], count, first);
}
