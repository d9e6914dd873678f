// Products of two activations: the right one is packed like weights, per image (and head), and stays in cache.

template <class Loop>
struct Panel {
    const typename Loop::Right *data;
    int32_t *column_sum;  // (units * 16,); of a Product: what zero-points add to each column
    int64_t units, groups, unit_elements;
};

// The right operand less `middle`, packed; see `pack_units`.
template <class Loop>
static Panel<Loop> pack_right(Slot slot, const uint8_t *source, int64_t stride, bool transposed, int64_t inner,
                              int64_t columns, int32_t middle) {
    using Right = typename Loop::Right;
    const int64_t units = (columns + 15) / 16, groups = round_up(inner, kInnerStep) / 4;
    const int64_t unit_elements = groups * kGroupBytes;
    const size_t sum_bytes = size_t(units) * 64;
    uint8_t *memory = static_cast<uint8_t *>(scratch(slot, sum_bytes + size_t(units * unit_elements) * sizeof(Right)));
    int32_t *column_sum = reinterpret_cast<int32_t *>(memory);
    Right *numbers = reinterpret_cast<Right *>(memory + sum_bytes);
    if constexpr (sizeof(Right) == 1) {
        pack_units(source, stride, transposed, inner, columns, middle, unit_elements, numbers, column_sum);
    } else {
        int8_t *bytes = static_cast<int8_t *>(scratch(kWidened, size_t(units * unit_elements)));
        pack_units(source, stride, transposed, inner, columns, middle, unit_elements, bytes, column_sum);
        widen_right(bytes, units * groups, numbers);
    }
    return {numbers, column_sum, units, groups, unit_elements};
}

// Rows of something else that are done, some at a time, while tiles are multiplied.
template <class Task>
struct Meanwhile {
    const Task &task;
    int64_t next, end;
    FXQ_INLINE void some(const Task &one, int64_t most) {
        for (const int64_t stop = end - next < most ? end : next + most; next < stop; ++next) one(next);
    }
};

// What one tile does of it.
template <class Task>
struct Share {
    Meanwhile<Task> *all;
    int count;
    FXQ_INLINE Task task() const { return all->task; }
    FXQ_INLINE void some(const Task &one, int most) {
        const int now = most < count ? most : count;
        all->some(one, now), count -= now;
    }
};

// A block of rows that multiplies a panel, one plane for each digit.
template <class Loop>
struct Block {
    const typename Loop::Left *data;
    int64_t count, stride;
    const typename Loop::Left *plane(int digit) const { return data + digit * count * stride; }
};

template <class Number>
static FXQ_INLINE int64_t sum_of(const Number *left, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += left[k];
    return sum;
}

// levels: those of the left operand; low: what the loop takes off its bytes.
template <class Loop>
struct Product {
    Loop loop;
    FxqLevels levels;
    int32_t low;
    Panel<Loop> panel;
    int64_t inner, columns;
    int32_t right_zero;
    bool is_wide;
    Product(const Loop &a_loop, const FxqLevels &l, int32_t least, const Panel<Loop> &p, int64_t k, int64_t m, int32_t zero)
        : loop(a_loop), levels(l), low(least), panel(p), inner(k), columns(m), right_zero(zero), is_wide(is_wide_sum(l, k, 255)) {
        levels.zero -= low + shift_of(levels);
        if (is_wide) return;
        for (int64_t c = 0; c < panel.units * 16; ++c)
            panel.column_sum[c] = static_cast<int32_t>(0u - static_cast<uint32_t>(panel.column_sum[c]) * static_cast<uint32_t>(levels.zero));
    }
    int64_t padded() const { return panel.groups * 4; }
    int64_t stride() const { return panel.units * 16; }
};

// sums (digits, rows, stride) = left times right; and task(row) for `others` rows.
template <class Loop, class Task>
static FXQ_INLINE void multiply(const Block<Loop> &left, const Product<Loop> &product, int32_t *sums, int64_t others, const Task &task) {
    const Panel<Loop> &panel = product.panel;
    const int64_t stride = product.stride();
    const int digits = product.levels.count;
    const int units = vectors_for(panel.units), step = rows_for(units);
    int64_t tiles = digits * ((panel.units + units - 1) / units) * ((left.count + step - 1) / step);
    Meanwhile<Task> meanwhile{task, 0, others};
    for (int d = 0; d < digits; ++d, sums += left.count * stride)
        for (int64_t u = 0; u < panel.units;) {
            const int vectors = vectors_for(panel.units - u), rows = rows_for(vectors);
            for (int64_t r = 0; r < left.count; r += rows, --tiles) {
                const bool begins = d == 0 && product.levels.zero && !product.is_wide;
                Share<Task> share{&meanwhile, static_cast<int>((others - meanwhile.next) / (tiles > 1 ? tiles : 1))};
                tile(product.loop, static_cast<int>(left.count - r < rows ? left.count - r : rows), vectors, left.plane(d) + r * left.stride,
                     left.stride, panel.data + u * panel.unit_elements, panel.unit_elements, panel.groups,
                     begins ? panel.column_sum + u * 16 : nullptr, 0, sums + r * stride + u * 16, stride, share);
                share.some(task, share.count);
            }
            u += vectors;
        }
    meanwhile.some(task, others);
}

// One row's values, kLanes columns from c on. sums: what `multiply` gave. Zero-points are taken out:
// sum (a - a0)(b - b0) = sum ab - a0 sum b - b0 sum a + n a0 b0.
template <bool has_digits, class Loop>
struct RowValues {
    const Product<Loop> &p;
    const int32_t *sums;
    int64_t plane, constant = 0;
    FXQ_INLINE RowValues(const Product<Loop> &product, const Block<Loop> &left, const int32_t *all_sums, int64_t row)
        : p(product), sums(all_sums + row * product.stride()), plane(left.count * product.stride()) {
        if (!p.right_zero) return;
        constant = p.inner * (p.levels.zero + shift_of(p.levels));  // the bytes that are added up here are whole
        for (int d = 0; d < p.levels.count; ++d) constant -= sum_of(left.plane(d) + row * left.stride, p.padded()) << (8 * d);
        constant *= p.right_zero;
    }
    FXQ_INLINE Vec operator()(int64_t c) const {
        const int64_t count = p.stride() - c;
        Whole correction = splat(static_cast<uint32_t>(constant));
        if (!p.is_wide && !kBegins) correction = correction + load(p.panel.column_sum + c, count);
        return total_of<has_digits>(p.levels, p.is_wide, sums + c, plane, correction, p.panel.column_sum + c, double(constant), count);
    }
};

// Calls task(row, values) for the rows of a product.
template <bool has_digits, class Loop, class Task>
static FXQ_INLINE void rows_with(const Product<Loop> &p, const Block<Loop> &left, const int32_t *sums, const Task &task) {
    for (int64_t r = 0; r < left.count; ++r) task(r, RowValues<has_digits, Loop>(p, left, sums, r));
}

template <class Loop, class Task>
static FXQ_INLINE void for_rows(const Product<Loop> &p, const Block<Loop> &left, const int32_t *sums, const Task &task) {
    if (p.levels.count == 1) rows_with<false>(p, left, sums, task);
    else rows_with<true>(p, left, sums, task);
}

// Codes as a block: where they lie if they are digits and whole tiles already, each row with `zeros` behind it; else
// copied to `memory`.
template <class Loop>
static Block<Loop> block_of(const Product<Loop> &product, const uint8_t *codes, int64_t stride, int64_t rows, int64_t zeros,
                            typename Loop::Left *memory) {
    using Left = typename Loop::Left;
    const FxqLevels &levels = product.levels;
    const int64_t inner = product.inner, padded = product.padded();
    if (sizeof(Left) == 1 && levels.identity && product.low == 0 && inner + zeros == padded && rows % kWholeRows == 0)
        return {reinterpret_cast<const Left *>(codes), rows, stride};
    for (int d = 0; d < levels.count; ++d) expand(levels, d, product.low, codes, stride, rows, inner, padded, memory + d * rows * padded);
    return {memory, rows, padded};
}

template <class Loop>
static void matmul_with(const Loop &loop, int32_t low, int32_t middle, const MatmulCall &call, int64_t batch) {
    [[maybe_unused]] const Session session;
    using Left = typename Loop::Left;
    const Panel panel = pack_right<Loop>(kPanel, call.right + batch * call.k * call.m, call.transposed ? call.k : call.m,
                                         call.transposed != 0, call.k, call.m, middle);
    const Product<Loop> product(loop, *call.left_levels, low, panel, call.k, call.m, call.right_zero - middle);
    const size_t digits = size_t(call.left_levels->count);
    Left *left = static_cast<Left *>(scratch(kLeft, digits * size_t(kRowBlock * product.padded()) * sizeof(Left)));
    int32_t *sums = static_cast<int32_t *>(scratch(kSums, digits * size_t(kRowBlock * product.stride()) * 4));
    const Vec scale = splat(call.scale);
    for (int64_t r = 0; r < call.n; r += kRowBlock) {
        const int64_t rows = call.n - r < kRowBlock ? call.n - r : kRowBlock;
        const uint8_t *codes = call.left + (batch * call.n + r) * call.k;
        float *out = call.out + (batch * call.n + r) * call.m;
        const Block<Loop> block = block_of(product, codes, call.k, rows, 0, left);
        multiply(block, product, sums, 0, [](int64_t) {});
        for_rows(product, block, sums, [&](int64_t row, const auto &values) {
            for (int64_t c = 0; c < call.m; c += kLanes) store(values(c) * scale, out + row * call.m + c, call.m - c);
        });
    }
}

static void matmul(const MatmulCall &call, int64_t batch) {
    const int64_t left_size = call.n * call.k, right_size = call.k * call.m;
    const LeftReach left = left_reach(*call.left_levels, call.left + batch * left_size, left_size, 1, left_size);
    const RightReach right = right_reach(call.right + batch * right_size, right_size, 1, right_size);
    choose_loop(depth_of(left.most, right.most),
                [&](const auto &loop) { matmul_with(loop, left.low, right.middle, call, batch); });
}
