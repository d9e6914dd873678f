// What the sets for ARM share: vectors of 16 floats in four registers, tables, and the packing of activations.
//
// The including file says how a packed panel lies: `arrange(panel, groups)` gets it in the order of the weights.

constexpr int kLanes = 16, kRegisterBytes = 16;

struct Vec {
    float32x4_t part[4];
};
struct Whole {
    uint32x4_t part[4];
};

// {task(0), ..., task(3)}.
template <class Four, class Task>
static FXQ_INLINE Four four(const Task &task) {
    return {{task(0), task(1), task(2), task(3)}};
}

// Loads stay on their side of it: compilers that move them all to the front run out of registers.
static FXQ_INLINE void keep_order() { asm volatile("" ::: "memory"); }

// Copies the first `count` of 16 elements.
template <class Number>
static FXQ_INLINE void copy_some(const Number *from, int64_t count, Number *to) {
    for (int64_t i = 0; i < count && i < kLanes; ++i) to[i] = from[i];
}

static FXQ_INLINE Vec splat(float x) { return four<Vec>([&](int) FXQ_ALWAYS { return vdupq_n_f32(x); }); }
static FXQ_INLINE Whole splat(uint32_t x) { return four<Whole>([&](int) FXQ_ALWAYS { return vdupq_n_u32(x); }); }
static FXQ_INLINE Vec load(const float *from, int64_t count) {
    float some[kLanes] = {};
    if (count < kLanes) copy_some(from, count, some), from = some;
    return four<Vec>([&](int i) FXQ_ALWAYS { return vld1q_f32(from + i * 4); });
}
static FXQ_INLINE Whole load(const int32_t *from, int64_t count) {
    int32_t some[kLanes] = {};
    if (count < kLanes) copy_some(from, count, some), from = some;
    return four<Whole>([&](int i) FXQ_ALWAYS { return vreinterpretq_u32_s32(vld1q_s32(from + i * 4)); });
}
static FXQ_INLINE void store(Vec x, float *to, int64_t count) {
    float some[kLanes];
    float *const at = count < kLanes ? some : to;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vst1q_f32(at + i * 4, x.part[i]);
    if (count < kLanes) copy_some(some, count, to);
}

// The first, third, ... byte or pair of bytes of two registers.
static FXQ_INLINE uint8x16_t even_bytes(uint8x16_t a, uint8x16_t b) { return vuzp1q_u8(a, b); }
static FXQ_INLINE uint8x16_t even_pairs(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
}
// The last byte of every number.
static FXQ_INLINE void store_bytes(Whole x, uint8_t *to, int64_t count) {
    const uint8x16_t bytes = even_bytes(even_pairs(x.part[0], x.part[1]), even_pairs(x.part[2], x.part[3]));
    if (count >= kLanes) {
        vst1q_u8(to, bytes);
        return;
    }
    uint8_t some[kLanes];
    vst1q_u8(some, bytes);
    copy_some(some, count, to);
}

static FXQ_INLINE Vec operator+(Vec a, Vec b) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vaddq_f32(a.part[i], b.part[i]); });
}
static FXQ_INLINE Vec operator-(Vec a, Vec b) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vsubq_f32(a.part[i], b.part[i]); });
}
static FXQ_INLINE Vec operator*(Vec a, Vec b) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vmulq_f32(a.part[i], b.part[i]); });
}
static FXQ_INLINE Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), then.part[i], otherwise.part[i]); });
}
// By comparison: this processor's own largest is no number where one of two is none.
static FXQ_INLINE Vec larger(Vec a, Vec b) { return if_less(b, a, a, b); }  // b where a is no number
static FXQ_INLINE Vec smaller(Vec a, Vec b) { return if_less(a, b, a, b); }
static FXQ_INLINE Vec size_of(Vec a) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vabsq_f32(a.part[i]); });
}
static FXQ_INLINE Vec fused(Vec a, Vec b, Vec c) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
static FXQ_INLINE Vec only(Vec x, int64_t count, float rest) {  // the first `count` of x
    if (count >= kLanes) return x;
    float some[kLanes], numbers[kLanes];
    store(x, numbers, kLanes);
    for (int i = 0; i < kLanes; ++i) some[i] = i < count ? numbers[i] : rest;
    return load(some, kLanes);
}
static FXQ_INLINE Vec to_float(Whole x) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vcvtq_f32_s32(vreinterpretq_s32_u32(x.part[i])); });
}
static FXQ_INLINE Whole bits_of(Vec x) {
    return four<Whole>([&](int i) FXQ_ALWAYS { return vreinterpretq_u32_f32(x.part[i]); });
}
static FXQ_INLINE Vec float_of(Whole x) {
    return four<Vec>([&](int i) FXQ_ALWAYS { return vreinterpretq_f32_u32(x.part[i]); });
}
static FXQ_INLINE Whole operator+(Whole a, Whole b) {
    return four<Whole>([&](int i) FXQ_ALWAYS { return vaddq_u32(a.part[i], b.part[i]); });
}
static FXQ_INLINE Whole operator-(Whole a, Whole b) {
    return four<Whole>([&](int i) FXQ_ALWAYS { return vsubq_u32(a.part[i], b.part[i]); });
}
static FXQ_INLINE Whole operator<<(Whole a, int by) {
    return four<Whole>([&](int i) FXQ_ALWAYS { return vshlq_u32(a.part[i], vdupq_n_s32(by)); });
}
static FXQ_INLINE Whole operator>>(Whole a, int by) {
    return four<Whole>([&](int i) FXQ_ALWAYS { return vshlq_u32(a.part[i], vdupq_n_s32(-by)); });
}

// The integer that a float which was rounded by adding holds, below the pieces of GELU's table.
static FXQ_INLINE Whole piece_of(Vec sum) {
    const Whole bits = bits_of(sum);
    return four<Whole>([&](int i) FXQ_ALWAYS { return vandq_u32(bits.part[i], vdupq_n_u32(kGeluPieces - 1)); });
}

// Four registers of four numbers, rows and columns exchanged.
static FXQ_INLINE void transpose(uint32x4_t *rows) {
    const uint32x4_t a = vzip1q_u32(rows[0], rows[2]), b = vzip2q_u32(rows[0], rows[2]);
    const uint32x4_t c = vzip1q_u32(rows[1], rows[3]), d = vzip2q_u32(rows[1], rows[3]);
    rows[0] = vzip1q_u32(a, c), rows[1] = vzip2q_u32(a, c), rows[2] = vzip1q_u32(b, d), rows[3] = vzip2q_u32(b, d);
}

// The coefficients of GELU's pieces, times a factor. A piece's lie side by side, so that one load has them all.
struct Pieces {
    static_assert(kGeluDegree == 3, "four coefficients fill a register");
    alignas(16) float numbers[kGeluPieces][4];
    explicit Pieces(float factor) {
        for (int i = 0; i < kGeluPieces; ++i)
            for (int k = 0; k < 4; ++k) numbers[i][k] = gelu_table[k][i] * factor;
    }
    FXQ_INLINE void take(Whole piece, Vec *coefficients) const {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t at = piece.part[i];
            const auto of = [&](uint32_t index) FXQ_ALWAYS { return vreinterpretq_u32_f32(vld1q_f32(numbers[index])); };
            uint32x4_t rows[4] = {of(vgetq_lane_u32(at, 0)), of(vgetq_lane_u32(at, 1)), of(vgetq_lane_u32(at, 2)),
                                  of(vgetq_lane_u32(at, 3))};
            transpose(rows);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) coefficients[k].part[i] = vreinterpretq_f32_u32(rows[k]);
        }
    }
};

// Of 32 numbers.
static FXQ_INLINE float largest_of(const Vec *x) {
    const Vec most = larger(x[0], x[1]);
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(most.part[0], most.part[1]), vmaxq_f32(most.part[2], most.part[3])));
}

static FXQ_INLINE uint8x16x4_t sixty_four(const uint8_t *table) {
    return {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}};
}

// A table of 256 bytes is looked up in quarters. An index beyond a quarter leaves what was found before.
static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, uint8_t *out) {
    const uint8x16x4_t a = sixty_four(table), b = sixty_four(table + 64), c = sixty_four(table + 128), d = sixty_four(table + 192);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const uint8x16_t code = vld1q_u8(codes + i);
        uint8x16_t found = vqtbl4q_u8(a, code);
        found = vqtbx4q_u8(found, b, vsubq_u8(code, vdupq_n_u8(64)));
        found = vqtbx4q_u8(found, c, vsubq_u8(code, vdupq_n_u8(128)));
        found = vqtbx4q_u8(found, d, vsubq_u8(code, vdupq_n_u8(192)));
        vst1q_u8(out + i, found);
    }
    for (; i < count; ++i) out[i] = table[codes[i]];
}

// The table's entries for rounded numbers, limited to its size; 16 at a time, of whose rows one instruction reads all.
template <int count>
static FXQ_INLINE void table_bytes(const uint8_t *table, int steps, const Vec *x, uint8_t *out) {
    static_assert(kTableRow == 64, "a row fills four registers");
    for (int v = 0; v < count / kLanes; ++v) {
        const Vec y = larger(smaller(x[v], splat(float(FXQ_TABLE_ENTRIES - 1))), splat(0.0f));
        const Whole entry = four<Whole>([&](int i) FXQ_ALWAYS { return vreinterpretq_u32_s32(vcvtnq_s32_f32(y.part[i])); });
        const uint8x16_t a = even_pairs(entry.part[0], entry.part[1]), b = even_pairs(entry.part[2], entry.part[3]);
        const uint8x16_t low = even_bytes(a, b), high = vuzp2q_u8(a, b);
        uint8x16_t bytes = vqtbl4q_u8(sixty_four(table), high);
        for (int step = 0; step < steps; ++step) {
            const uint8_t *at = table + (2 * step + 1) * kTableRow;
            const uint8x16_t is_beyond = vcgeq_u8(low, vqtbl4q_u8(sixty_four(at), high));
            bytes = vbslq_u8(is_beyond, vqtbl4q_u8(sixty_four(at + kTableRow), high), bytes);
        }
        vst1q_u8(out + v * kLanes, bytes);
    }
}
