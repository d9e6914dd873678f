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

// For sums of `inner` levels times numbers of at most `most_right`.
static Sum sum_kind(const FxqLevels &levels, int64_t inner, int64_t most_right) {
    if (levels.count == 1) return kOneDigit;
    int64_t most = 0;
    for (int b = 0; b < 256; ++b) {
        int64_t level = -int64_t(levels.zero);
        for (int d = 0; d < levels.count; ++d) level += int64_t(levels.digit[d][b]) << (8 * d);
        most = level > most ? level : -level > most ? -level : most;
    }
    return most * inner * most_right < int64_t(1) << 31 ? kNarrow : kWide;
}

constexpr int kTileVectors = kTileColumns / kLanes;
static_assert(kTileVectors * kLanes == kTileColumns, "rows of a tile are whole vectors");

// Digits' sums of kLanes columns as numbers, less what zero-points add: plus `correction`, or where int32 does not hold it,
// less zero times column_sum, plus a constant. sums: int32, `plane` apart for each digit.
// Unsigned: a damaged layout may hold any sum, and wrapping round is defined for unsigned numbers only.
template <Sum sum>
static FXQ_INLINE Vec total_of(const FxqLevels &levels, const int32_t *sums, int64_t plane, Whole correction,
                               const int32_t *column_sum, double constant, int64_t count) {
    if (sum == kWide) {
        alignas(64) float totals[kLanes] = {};
        for (int lane = 0; lane < kLanes && lane < count; ++lane) {
            double value = double(sums[lane]) + 256.0 * double(sums[plane + lane]);
            if (levels.count == 3) value += 65536.0 * double(sums[2 * plane + lane]);
            totals[lane] = float(value - double(column_sum[lane]) * double(levels.zero) + constant);
        }
        return load(totals, kLanes);
    }
    Whole value = load(sums, count) + correction;
    if (sum == kNarrow) value = value + (load(sums + plane, count) << 8);
    if (sum == kNarrow && levels.count == 3) value = value + (load(sums + 2 * plane, count) << 16);
    return to_float(value);
}

// Calls task(v) for every vector of a row, v constant: only so do compilers keep arrays of vectors in registers.
template <class Task, int... v>
static FXQ_INLINE void each_vector(const Task &task, std::integer_sequence<int, v...>) {
    (task(std::integral_constant<int, v>()), ...);
}
template <class Task>
static FXQ_INLINE void each_vector(const Task &task) {
    each_vector(task, std::make_integer_sequence<int, kTileVectors>());
}

// A panel's columns: what turns the sums of a row into numbers. Panels begin at multiples of their width, so what is
// read beyond the last column is padding of the layout's vectors.
template <Sum sum>
struct Columns {
    Vec scale[kTileVectors], bias[kTileVectors];
    alignas(64) int32_t begin[kTileColumns];  // what sums begin at
    Whole correction[kTileVectors];           // what is left to add
    const FxqLevels *levels;
    const int32_t *weight_sum;
    int64_t first;
    int count;
    Columns(const LinearCall &call, int64_t unit, int vectors) : levels(&call.spec->input), first(unit * kUnit) {
        const auto *scales = reinterpret_cast<const float *>(call.layout + call.places.scale) + first;
        const auto *biases = reinterpret_cast<const float *>(call.layout + call.places.bias) + first;
        weight_sum = reinterpret_cast<const int32_t *>(call.layout + call.places.weight_sum) + first;
        for (int v = 0; v < kTileVectors; ++v) {
            scale[v] = load(scales + v * kLanes, kLanes), bias[v] = load(biases + v * kLanes, kLanes);
        }
        for (int i = 0; i < kTileColumns; ++i)
            begin[i] = static_cast<int32_t>(0u - static_cast<uint32_t>(weight_sum[i]) * static_cast<uint32_t>(levels->zero));
        for (int v = 0; v < kTileVectors; ++v) correction[v] = kBegins ? splat(0u) : load(begin + v * kLanes, kLanes);
        const int64_t left = call.spec->out_features - first;
        count = static_cast<int>(left < vectors * kUnit ? left : vectors * kUnit);
    }
    // Columns v kLanes and on. sums: a row of int32 (digits, kTileRows, kTileColumns).
    FXQ_INLINE Vec at(const int32_t *sums, int v) const {
        const Vec total = total_of<sum>(*levels, sums + v * kLanes, kTileRows * kTileColumns, correction[v],
                                        weight_sum + v * kLanes, 0.0, kLanes);
        return fused(total, scale[v], bias[v]);
    }
};

// What becomes of a row of a tile. Whole panels are computed, and as much stored as there are columns.
template <Sum sum, bool has_residual>
struct FloatRow {
    static constexpr int kAtOnce = 1;
    Columns<sum> columns;
    const LinearCall &call;
    FloatRow(const LinearCall &linear, int64_t unit, int vectors) : columns(linear, unit, vectors), call(linear) {}
    FXQ_INLINE void operator()(const int32_t *sums, int64_t row, int) const {
        const int64_t place = row * call.spec->out_features + columns.first;
        const float *residual = call.residual + place;  // may be `out` itself
        float *out = static_cast<float *>(call.out) + place;
        const auto part = [&](int v) FXQ_ALWAYS {
            const int i = v * kLanes, left = columns.count - i;
            if (left <= 0) return;
            Vec y = columns.at(sums, v);
            if (has_residual) y = load(residual + i, left) + y;
            store(y, out + i, left);
        };
        if (kLanes > 1) each_vector(part);
        else
            for (int v = 0; v < columns.count; ++v) part(v);
    }
};

// One row's bytes; by way of a buffer where the compiler makes the vectors, for whom loops must have constant length.
template <class Bytes>
static FXQ_INLINE void store_row(const Bytes &bytes_at, uint8_t *__restrict out, int count) {
    if (kLanes > 1) {
        each_vector([&](int v) FXQ_ALWAYS {
            if (v * kLanes < count) store_bytes(bytes_at(v), out + v * kLanes, count - v * kLanes);
        });
        return;
    }
    alignas(64) uint8_t bytes[kTileColumns];
    for (int i = 0; i < kTileColumns; ++i) store_bytes(bytes_at(i), bytes + i, kLanes);
    __builtin_memcpy(out, bytes, static_cast<size_t>(count));
}

// Scales and biases of such a layer are in units of the output's scale.
template <Sum sum>
struct CodesRow {
    static constexpr int kAtOnce = 1;
    Columns<sum> columns;
    Vec low[kTileVectors], high[kTileVectors];
    Whole zero[kTileVectors];
    uint8_t *out;
    int64_t stride;
    CodesRow(const LinearCall &call, int64_t unit, int vectors)
        : columns(call, unit, vectors), out(static_cast<uint8_t *>(call.out) + columns.first),
          stride(call.spec->out_features) {
        const uint8_t *lows = call.layout + call.places.columns + columns.first * 4, *highs = lows + call.places.vector;
        const uint8_t *zeros = highs + call.places.vector;
        for (int v = 0; v < kTileVectors; ++v) {
            low[v] = load(reinterpret_cast<const float *>(lows) + v * kLanes, kLanes);
            high[v] = load(reinterpret_cast<const float *>(highs) + v * kLanes, kLanes);
            zero[v] = load(reinterpret_cast<const int32_t *>(zeros) + v * kLanes, kLanes);
        }
    }
    FXQ_INLINE void operator()(const int32_t *sums, int64_t row, int) const {
        const auto bytes = [&](int v) FXQ_ALWAYS { return uniform_byte(columns.at(sums, v), low[v], high[v], zero[v]); };
        store_row(bytes, out + row * stride, columns.count);
    }
};

template <Sum sum, class Bytes>
struct GeluRow {
    static constexpr int kAtOnce = 1;
    Columns<sum> columns;
    Bytes to_byte;
    ScaledGelu gelu;
    uint8_t *out;
    int64_t stride;
    GeluRow(const LinearCall &call, int64_t unit, int vectors)
        : columns(call, unit, vectors), to_byte(call.spec->output[0]), gelu(1.0f / call.spec->output[0].scale),
          out(static_cast<uint8_t *>(call.out) + columns.first), stride(call.spec->out_features) {}
    FXQ_INLINE void operator()(const int32_t *sums, int64_t row, int) const {
        const auto bytes = [&](int v) FXQ_ALWAYS { return to_byte.of_units(gelu(columns.at(sums, v))); };
        store_row(bytes, out + row * stride, columns.count);
    }
};

// Several rows at a time, 64 numbers where tiles have so many.
template <Sum sum>
struct TableRow {
    static constexpr int kAtOnce = 64 / kTileColumns < kTileRows ? 64 / kTileColumns : kTileRows;
    static constexpr int kNumbers = kAtOnce * kTileColumns;
    Columns<sum> columns;
    const uint8_t *table;
    int steps;
    uint8_t *out;
    int64_t stride;
    TableRow(const LinearCall &call, int64_t unit, int vectors)
        : columns(call, unit, vectors), table(call.layout + call.places.table), steps(call.spec->steps),
          out(static_cast<uint8_t *>(call.out) + columns.first), stride(call.spec->out_features) {}
    FXQ_INLINE void operator()(const int32_t *sums, int64_t row, int count) const {
        Vec x[kNumbers / kLanes];
        for (int i = 0; i < kNumbers / kLanes; ++i) x[i] = columns.at(sums + i / kTileVectors * kTileColumns, i % kTileVectors);
        alignas(64) uint8_t bytes[kNumbers];
        table_bytes<kNumbers>(table, steps, x, bytes);
        for (int r = 0; r < count; ++r) {
            uint8_t *to = out + (row + r) * stride;
            if (columns.count == kTileColumns) __builtin_memcpy(to, bytes + r * kTileColumns, kTileColumns);
            else __builtin_memcpy(to, bytes + r * kTileColumns, static_cast<size_t>(columns.count));
        }
    }
};

// The rows of a finished tile; a set that can does them while its next tile is multiplied.
template <class Row>
struct Rows {
    const Row *row;
    const int32_t *sums;
    int64_t first;
    int count;
    FXQ_INLINE Row task() const { return *row; }
    FXQ_INLINE void some(const Row &to_row, int most) {
        most = (most + Row::kAtOnce - 1) / Row::kAtOnce * Row::kAtOnce;
        const int now = most < count ? most : count;
        for (int i = 0; i < now; i += Row::kAtOnce)
            to_row(sums + i * kTileColumns, first + i, now - i < Row::kAtOnce ? now - i : Row::kAtOnce);
        sums += now * kTileColumns, first += now, count -= now;
    }
};

template <Sum sum, class Row>
static void linear_with(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
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
    // Inputs in chunks whose panel stays in the first-level cache; between them, sums wait in memory.
    const int64_t chunk = padded < 2 * kMostInner ? padded : kMostInner, chunks = (padded + chunk - 1) / chunk;
    const int64_t unit_elements = is_plain ? tiles * kGroups * kGroupBytes : round_up(chunk, kTileInputs) * kUnit;
    Right *panel = is_plain ? nullptr
                            : static_cast<Right *>(scratch(kPanel, size_t(kMaxVectors * unit_elements) * sizeof(Right)));
    constexpr int64_t kTile = kTileRows * kTileColumns;
    const int64_t tile_rows = (rows + kTileRows - 1) / kTileRows + 1;  // one more: copied rows begin a tile of their own
    int32_t *waiting = chunks == 1 ? nullptr : static_cast<int32_t *>(scratch(kSums, size_t(digits * tile_rows * kTile) * 4));
    // Each tile is finished while the next is multiplied.
    alignas(64) int32_t sums[2][FXQ_MAX_DIGITS * kTile] = {};
    int current = 0, panels = 0;
    Row kinds[2] = {Row(call, unit, 1), Row(call, unit, 1)};  // of the last panel and this one
    Rows<Row> before{kinds, sums[0], row, 0};
    for (int64_t u = unit; u < unit + units;) {
        const int vectors = vectors_for(unit + units - u), step = rows_for(vectors);
        Row *const kind = new (&kinds[++panels % 2]) Row(call, u, vectors);
        if (u + vectors < unit + units) {  // the next panel is on its way while this one multiplies
            const uint8_t *next = call.layout + call.places.weights + (u + vectors) * unit_bytes;
            for (int64_t byte = 0; byte < vectors * unit_bytes; byte += 64) __builtin_prefetch(next + byte, 0, 2);
        }
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t begin = c * chunk, inputs = padded - begin < chunk ? padded - begin : chunk;
            const int64_t first_tile = begin / kTileInputs;
            const uint8_t *packed = call.layout + call.places.weights + u * unit_bytes + first_tile * 64 * spec.weight_bits;
            const int64_t count_tiles = (tiles - first_tile) * kTileInputs < inputs ? tiles - first_tile : (inputs + kTileInputs - 1) / kTileInputs;
            for (int v = 0; v < vectors && !is_plain; ++v)
                unpack(spec.weight_bits, packed + v * unit_bytes, count_tiles, panel + v * unit_elements);
            const Right *right = is_plain ? reinterpret_cast<const Right *>(packed) : panel;
            int32_t *memory = waiting;
            for (int64_t r = 0; r < rows; memory += digits * kTile) {
                const int64_t left_over = (r < last ? last : rows) - r;
                const Left *from = (r < last ? left + r * padded : copied + (r - last) * padded) + begin;
                const int count = static_cast<int>(left_over < step ? left_over : step);
                const bool is_last = c + 1 == chunks;
                for (int d = 0; d < digits; ++d) {
                    const int32_t *begin = c ? memory + d * kTile : d == 0 && sum != kWide ? kind->columns.begin : nullptr;
                    tile(count, vectors, from + d * others * padded, padded, right, unit_elements, inputs / 4, begin,
                         c ? kTileColumns : 0, is_last ? sums[current] + d * kTile : memory + d * kTile, kTileColumns, before);
                }
                before.some(before.task(), kTileRows);
                if (is_last) before = {kind, sums[current], row + r, count}, current ^= 1;
                r += count;
            }
        }
        u += vectors;
    }
    before.some(before.task(), kTileRows);
}

template <Sum sum>
static void linear_with(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    const FxqLinear &spec = *call.spec;
    if (spec.epilogue == FXQ_FLOAT) linear_with<sum, FloatRow<sum, false>>(call, row, rows, unit, units);
    else if (spec.epilogue == FXQ_RESIDUAL) linear_with<sum, FloatRow<sum, true>>(call, row, rows, unit, units);
    else if (spec.epilogue == FXQ_CODES) linear_with<sum, CodesRow<sum>>(call, row, rows, unit, units);
    else if (spec.epilogue == FXQ_TABLE_CODES) linear_with<sum, TableRow<sum>>(call, row, rows, unit, units);
    else
        with_bytes(spec.output[0], [&](const auto &bytes) {
            linear_with<sum, GeluRow<sum, std::decay_t<decltype(bytes)>>>(call, row, rows, unit, units);
        });
}

static void linear(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    const FxqLinear &spec = *call.spec;
    switch (sum_kind(spec.input, spec.in_features, 1 << (spec.weight_bits - 1))) {
        case kOneDigit: return linear_with<kOneDigit>(call, row, rows, unit, units);
        case kNarrow: return linear_with<kNarrow>(call, row, rows, unit, units);
        default: return linear_with<kWide>(call, row, rows, unit, units);
    }
}
