// The linear layer: packed weights are unpacked panel by panel, multiplied tile by tile, and finished while in cache.

// Tiles of `bits`-bit codes, as signed numbers: 8 groups of 64 each.
template <int bits>
static void unpack_tiles(const uint8_t *__restrict packed, int64_t tiles, int8_t *__restrict out) {
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

static void unpack(int32_t bits, const uint8_t *packed, int64_t tiles, int8_t *out) {
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

// The same as numbers that a loop takes.
template <class Number>
static void unpack_panel(int32_t bits, const uint8_t *packed, int64_t tiles, Number *out) {
    if constexpr (sizeof(Number) == 1) {
        unpack(bits, packed, tiles, out);
    } else {
        alignas(64) int8_t bytes[kGroups * kGroupBytes];
        for (int64_t t = 0; t < tiles; ++t, packed += 64 * bits, out += kGroups * kGroupBytes) {
            unpack(bits, packed, 1, bytes);
            widen_right(bytes, kGroups, out);
        }
    }
}

// Rows of bytes as rows of one digit each, less `low`, padded to whole groups, whose weights are zero: (rows, padded).
template <class Number>
static FXQ_APART void expand(const FxqLevels &levels, int digit, int32_t low, const uint8_t *codes, int64_t stride, int64_t rows,
                   int64_t inner, int64_t padded, Number *__restrict out) {
    uint8_t *bytes = nullptr;
    if constexpr (sizeof(Number) != 1) bytes = static_cast<uint8_t *>(scratch(kWidened, size_t(padded)));
    for (int64_t r = 0; r < rows; ++r, codes += stride, out += padded) {
        if constexpr (sizeof(Number) == 1) bytes = out;
        if (levels.identity)
            for (int64_t k = 0; k < inner; ++k) bytes[k] = static_cast<uint8_t>(codes[k] - low);
        else
            look_up(levels.digit[digit], codes, inner, bytes);
        for (int64_t k = inner; k < padded; ++k) bytes[k] = 0;
        if constexpr (sizeof(Number) != 1) widen_left(bytes, padded, out);
    }
}

// What depends on the kind of row, as functions: all else of a layer is compiled once, not for every kind.
template <class Loop>
struct Finish {
    void *rows[2];  // of the last panel and this one
    // Makes a row for a panel; returns what its sums begin at, or null.
    const int32_t *(*begin)(void *row, const LinearCall &call, int64_t unit, int vectors);
    // Multiplies a tile, and may do some of the rows of the one before.
    void (*multiply)(const Loop &loop, int rows, int vectors, const typename Loop::Left *left, int64_t left_stride,
                     const typename Loop::Right *right, int64_t unit_elements, int64_t groups, const int32_t *begin,
                     int64_t begin_stride, int32_t *sums, int64_t sum_stride, Waiting &before);
    void (*end)(Waiting &before);  // does what is left of them
};

template <class Row>
static FXQ_APART const int32_t *begin_rows(void *row, const LinearCall &call, int64_t unit, int vectors) {
    const Row *const made = new (row) Row(call, unit, vectors);
    return call.is_wide ? nullptr : made->columns.begin;
}

template <class Row, class Loop>
static void multiply_beside(const Loop &loop, int rows, int vectors, const typename Loop::Left *left, int64_t left_stride,
                            const typename Loop::Right *right, int64_t unit_elements, int64_t groups, const int32_t *begin,
                            int64_t begin_stride, int32_t *sums, int64_t sum_stride, Waiting &before) {
    Rows<Row> work(before);
    tile(loop, rows, vectors, left, left_stride, right, unit_elements, groups, begin, begin_stride, sums, sum_stride, work);
    before = work.rest();
}

template <class Row>
static FXQ_APART void end_rows(Waiting &before) {
    Rows<Row> work(before);
    work.some(work.task(), kTileRows);
    before = work.rest();
}

// low: what the loop takes off the bytes. The zero-point in `call` has lost it already, and what tiles take off.
template <class Loop>
static FXQ_APART void linear_with(Loop loop, const Finish<Loop> &finish, int32_t low, const LinearCall &call, int64_t row, int64_t rows,
                        int64_t unit, int64_t units) {
    [[maybe_unused]] const Session session;
    using Left = typename Loop::Left;
    using Right = typename Loop::Right;
    const FxqLinear &spec = *call.spec;
    const int64_t inner = spec.in_features, padded = round_up(inner, kInnerStep), tiles = call.places.tiles;
    const int64_t unit_bytes = tiles * 64 * spec.weight_bits;
    const int digits = spec.input.count;
    // Bytes are used where they lie if they are digits already, rows are whole groups and tiles are whole.
    const bool is_direct = sizeof(Left) == 1 && spec.input.identity && low == 0 && inner == padded;
    const int64_t last = is_direct ? rows / kWholeRows * kWholeRows : 0, others = rows - last;
    Left *copied = nullptr;  // the rows from `last` on
    if (others) {
        const int64_t room = round_up(others, kWholeRows);
        copied = static_cast<Left *>(scratch(kLeft, size_t((digits - 1) * others + room) * size_t(padded) * sizeof(Left)));
        for (int d = 0; d < digits; ++d)
            expand(spec.input, d, low, call.codes + (row + last) * inner, inner, others, inner, padded, copied + d * others * padded);
    }
    const Left *left = reinterpret_cast<const Left *>(call.codes + row * inner);
    const bool is_plain = sizeof(Right) == 1 && spec.weight_bits == 8 && inner == padded && !loop.prepares();
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
    Waiting before{finish.rows[0], sums[0], row, 0};
    for (int64_t u = unit; u < unit + units;) {
        const int vectors = vectors_for(unit + units - u), step = rows_for(vectors);
        void *const kind = finish.rows[++panels % 2];
        const int32_t *const begins = finish.begin(kind, call, u, vectors);
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
                unpack_panel(spec.weight_bits, packed + v * unit_bytes, count_tiles, panel + v * unit_elements);
            for (int v = 0; v < vectors && loop.prepares(); ++v) loop.prepare(v, panel + v * unit_elements, inputs / 4);
            const Right *right = is_plain ? reinterpret_cast<const Right *>(packed) : panel;
            int32_t *memory = waiting;
            for (int64_t r = 0; r < rows; memory += digits * kTile) {
                const int64_t left_over = (r < last ? last : rows) - r;
                const Left *from = (r < last ? left + r * padded : copied + (r - last) * padded) + begin;
                const int count = static_cast<int>(left_over < step ? left_over : step);
                const bool is_last = c + 1 == chunks;
                for (int d = 0; d < digits; ++d) {
                    const int32_t *begin = c ? memory + d * kTile : d == 0 ? begins : nullptr;
                    finish.multiply(loop, count, vectors, from + d * others * padded, padded, right, unit_elements, inputs / 4, begin,
                                    c ? kTileColumns : 0, is_last ? sums[current] + d * kTile : memory + d * kTile, kTileColumns, before);
                }
                finish.end(before);
                if (is_last) before = {kind, sums[current], row + r, count}, current ^= 1;
                r += count;
            }
        }
        u += vectors;
    }
    finish.end(before);
}

// With sums that become what Row makes of them.
template <class Row, class Loop>
static void linear_to(const Loop &loop, int32_t low, const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    alignas(Row) uint8_t memory[2][sizeof(Row)];
    for (uint8_t *of_panel : memory) begin_rows<Row>(of_panel, call, unit, 1);
    const Finish<Loop> finish = {{memory[0], memory[1]}, begin_rows<Row>, multiply_beside<Row, Loop>, end_rows<Row>};
    linear_with(loop, finish, low, call, row, rows, unit, units);
}

template <bool has_digits, class Loop, class... Arguments>
static void linear_by_epilogue(const Loop &loop, int32_t low, const LinearCall &call, Arguments... part) {
    const FxqLinear &spec = *call.spec;
    if (spec.epilogue == FXQ_FLOAT) linear_to<FloatRow<has_digits, false>>(loop, low, call, part...);
    else if (spec.epilogue == FXQ_RESIDUAL) linear_to<FloatRow<has_digits, true>>(loop, low, call, part...);
    else if (spec.epilogue == FXQ_CODES) linear_to<CodesRow<has_digits>>(loop, low, call, part...);
    else if (spec.epilogue == FXQ_TABLE_CODES) linear_to<TableRow<has_digits>>(loop, low, call, part...);
    else
        with_bytes(spec.output[0], [&](const auto &bytes) {
            linear_to<GeluRow<has_digits, std::decay_t<decltype(bytes)>>>(loop, low, call, part...);
        });
}

// The columns of finished rows that have codebooks.
static void snap_columns(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    const FxqLinear &spec = *call.spec;
    if (spec.epilogue != FXQ_CODES && spec.epilogue != FXQ_GELU_CODES) return;
    uint8_t *out = static_cast<uint8_t *>(call.out) + row * spec.out_features;
    const int64_t width = spec.out_features / spec.ranges;
    for (int32_t range = 0; range < spec.ranges; ++range) {
        const int64_t first = unit * kUnit > range * width ? unit * kUnit : range * width;
        const int64_t end = (unit + units) * kUnit < (range + 1) * width ? (unit + units) * kUnit : (range + 1) * width;
        if (first < end) snap(spec.output[range], out + first, rows, end - first, spec.out_features);
    }
}

static void linear(const LinearCall &call, int64_t row, int64_t rows, int64_t unit, int64_t units) {
    const FxqLinear &spec = *call.spec;
    const int32_t most_weight = 1 << (spec.weight_bits - 1);
    const LeftReach reach = left_reach(spec.input, call.codes + row * spec.in_features, spec.in_features, rows, spec.in_features);
    FxqLinear moved;
    LinearCall less = call;
    const int32_t taken = reach.low + shift_of(spec.input);
    if (taken) moved = spec, moved.input.zero -= taken, less.spec = &moved;
    less.is_wide = is_wide_sum(spec.input, spec.in_features, most_weight);
    const auto first_panel = [&](int64_t *groups) {
        const int64_t tiles = call.places.tiles < kMostInner / kTileInputs ? call.places.tiles : kMostInner / kTileInputs;
        int8_t *const panel = static_cast<int8_t *>(scratch(kPanel, size_t(tiles * kGroups * kGroupBytes)));
        unpack(spec.weight_bits, call.layout + call.places.weights + unit * call.places.tiles * 64 * spec.weight_bits, tiles, panel);
        *groups = tiles * kGroups;
        return panel;
    };
    choose_for_weights(reach.most, most_weight, rows, first_panel, [&](const auto &loop) {
        if (spec.input.count == 1) linear_by_epilogue<false>(loop, reach.low, less, row, rows, unit, units);
        else linear_by_epilogue<true>(loop, reach.low, less, row, rows, unit, units);
    });
    snap_columns(call, row, rows, unit, units);
}
