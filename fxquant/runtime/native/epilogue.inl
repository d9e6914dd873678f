// What becomes of the sums of a tile's rows: numbers, the residual's sum, or bytes, in the panel's columns.

constexpr int kTileColumns = kMaxVectors * kUnit;

// Whether no int32 holds sums of `inner` levels times numbers of at most `most_right`.
static bool is_wide_sum(const FxqLevels &levels, int64_t inner, int64_t most_right) {
    if (levels.count == 1) return false;
    int64_t most = 0;
    for (int b = 0; b < 256; ++b) {
        int64_t level = -int64_t(levels.zero);
        for (int d = 0; d < levels.count; ++d) level += int64_t(levels.digit[d][b]) << (8 * d);
        most = level > most ? level : -level > most ? -level : most;
    }
    return most * inner * most_right >= int64_t(1) << 31;
}

constexpr int kTileVectors = kTileColumns / kLanes;
static_assert(kTileVectors * kLanes == kTileColumns, "rows of a tile are whole vectors");

static FXQ_APART void wide_totals(const FxqLevels &levels, const int32_t *sums, int64_t plane, const int32_t *column_sum,
                                  double constant, int64_t count, float *totals) {
    for (int lane = 0; lane < kLanes; ++lane) {
        totals[lane] = 0;
        if (lane >= count) continue;
        double value = double(sums[lane]) + 256.0 * double(sums[plane + lane]);
        if (levels.count == 3) value += 65536.0 * double(sums[2 * plane + lane]);
        totals[lane] = float(value - double(column_sum[lane]) * double(levels.zero) + constant);
    }
}

// Digits' sums of kLanes columns as numbers, less what zero-points add: plus `correction`, or where int32 does not hold it
// (is_wide), less zero times column_sum, plus a constant. sums: int32, `plane` apart for each digit.
// Unsigned: a damaged layout may hold any sum, and wrapping round is defined for unsigned numbers only.
template <bool has_digits>
static FXQ_INLINE Vec total_of(const FxqLevels &levels, bool is_wide, const int32_t *sums, int64_t plane, Whole correction,
                               const int32_t *column_sum, double constant, int64_t count) {
    if (has_digits && is_wide) {
        alignas(64) float totals[kLanes];
        wide_totals(levels, sums, plane, column_sum, constant, count, totals);
        return load(totals, kLanes);
    }
    Whole value = load(sums, count) + correction;
    if (has_digits) value = value + (load(sums + plane, count) << 8);
    if (has_digits && levels.count == 3) value = value + (load(sums + 2 * plane, count) << 16);
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
template <bool has_digits>
struct Columns {
    Vec scale[kTileVectors], bias[kTileVectors];
    alignas(64) int32_t begin[kTileColumns];  // what sums begin at
    Whole correction[kTileVectors];           // what is left to add
    const FxqLevels *levels;
    const int32_t *weight_sum;
    int64_t first;
    int count;
    bool is_wide;
    Columns(const LinearCall &call, int64_t unit, int vectors) : levels(&call.spec->input), first(unit * kUnit), is_wide(call.is_wide) {
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
        const Vec total = total_of<has_digits>(*levels, is_wide, sums + v * kLanes, kTileRows * kTileColumns, correction[v],
                                        weight_sum + v * kLanes, 0.0, kLanes);
        return fused(total, scale[v], bias[v]);
    }
};

// What becomes of a row of a tile. Whole panels are computed, and as much stored as there are columns.
template <bool has_digits, bool has_residual>
struct FloatRow {
    static constexpr int kAtOnce = 1;
    Columns<has_digits> columns;
    const LinearCall &call;
    FloatRow(const LinearCall &linear, int64_t unit, int vectors) : columns(linear, unit, vectors), call(linear) {}
    FXQ_INLINE void operator()(const int32_t *sums, int64_t row, int) const {
        const int64_t place = row * call.spec->out_features + columns.first;
        const float *residual = has_residual ? call.residual + place : nullptr;  // may be `out` itself
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
template <bool has_digits>
struct CodesRow {
    static constexpr int kAtOnce = 1;
    Columns<has_digits> columns;
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

template <bool has_digits, class Bytes>
struct GeluRow {
    static constexpr int kAtOnce = 1;
    Columns<has_digits> columns;
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
template <bool has_digits>
struct TableRow {
    static constexpr int kAtOnce = 64 / kTileColumns < kTileRows ? 64 / kTileColumns : kTileRows;
    static constexpr int kNumbers = kAtOnce * kTileColumns;
    Columns<has_digits> columns;
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

// The rows of a finished tile that are still to be done.
struct Waiting {
    const void *row;  // a Row, which those who made it know
    const int32_t *sums;
    int64_t first;
    int count;
};

// The same, of a known kind; a set that can does them while its next tile is multiplied.
template <class Row>
struct Rows {
    const Row *row;
    const int32_t *sums;
    int64_t first;
    int count;
    explicit Rows(const Waiting &w) : row(static_cast<const Row *>(w.row)), sums(w.sums), first(w.first), count(w.count) {}
    Waiting rest() const { return {row, sums, first, count}; }
    FXQ_INLINE Row task() const { return *row; }
    FXQ_INLINE void some(const Row &to_row, int most) {
        most = (most + Row::kAtOnce - 1) / Row::kAtOnce * Row::kAtOnce;
        const int now = most < count ? most : count;
        for (int i = 0; i < now; i += Row::kAtOnce)
            to_row(sums + i * kTileColumns, first + i, now - i < Row::kAtOnce ? now - i : Row::kAtOnce);
        sums += now * kTileColumns, first += now, count -= now;
    }
};
