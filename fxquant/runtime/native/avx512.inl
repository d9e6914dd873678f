// What the sets for AVX512 share: vectors of 16 floats, tables, and the packing of activations.

typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Whole __attribute__((vector_size(64)));
constexpr int kLanes = 16;

static inline __mmask16 mask_of(int64_t count) { return count < 16 ? static_cast<__mmask16>((1u << count) - 1) : 0xffff; }
static inline __mmask64 mask64_of(int64_t count) { return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0); }

static inline Vec splat(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float *from, int64_t count) { return _mm512_maskz_loadu_ps(mask_of(count), from); }
static inline Whole load(const int32_t *from, int64_t count) {
    return (Whole)_mm512_maskz_loadu_epi32(mask_of(count), from);
}
static inline void store(Vec x, float *to, int64_t count) { _mm512_mask_storeu_ps(to, mask_of(count), x); }
static inline void store_bytes(Whole x, uint8_t *to, int64_t count) {
    if (count >= 16) _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8((__m512i)x));
    else _mm512_mask_cvtepi32_storeu_epi8(to, mask_of(count), (__m512i)x);
}
static inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where a is no number
static inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec if_less(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
static inline Vec to_float(Whole x) { return _mm512_cvtepi32_ps((__m512i)x); }
static inline Vec entry(const float *table, Whole index) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
}
static inline Whole bits_of(Vec x) { return (Whole)x; }
static inline Vec float_of(Whole bits) { return (Vec)bits; }

// The table of 256 bytes is in four registers; the first bit of a code says which two hold its entry.
static void look_up(const uint8_t *table, const uint8_t *codes, int64_t count, Left *out) {
    const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
    const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
    for (int64_t i = 0; i < count; i += 64) {
        const __mmask64 mask = mask64_of(count - i);
        const __m512i code = _mm512_maskz_loadu_epi8(mask, codes + i);
        const __m512i low = _mm512_permutex2var_epi8(a, code, b), high = _mm512_permutex2var_epi8(c, code, d);
        _mm512_mask_storeu_epi8(out + i, mask, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
    }
}

// Up to 64 bytes less 128; zero beyond `count`.
static inline __m512i signed_bytes(const uint8_t *from, int64_t count) {
    const __m512i middle = _mm512_set1_epi8(-128);
    if (count <= 0) return _mm512_setzero_si512();
    return _mm512_xor_si512(_mm512_mask_loadu_epi8(middle, mask64_of(count), from), middle);
}

// 16 rows of 16 times 4 bytes to 16 groups of 16 times 4 bytes.
static inline void transpose(__m512i *r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 4 rows of 64 bytes to 4 groups of 16 times 4 bytes: byte i of row r to group i / 16, place 4 (i % 16) + r.
static inline void interleave(__m512i *r) {
    const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    const __m512i e = _mm512_unpacklo_epi16(a, c), f = _mm512_unpackhi_epi16(a, c);
    const __m512i g = _mm512_unpacklo_epi16(b, d), h = _mm512_unpackhi_epi16(b, d);
    const __m512i i = _mm512_shuffle_i32x4(e, f, 0x44), j = _mm512_shuffle_i32x4(e, f, 0xee);
    const __m512i k = _mm512_shuffle_i32x4(g, h, 0x44), l = _mm512_shuffle_i32x4(g, h, 0xee);
    r[0] = _mm512_shuffle_i32x4(i, k, 0x88), r[1] = _mm512_shuffle_i32x4(i, k, 0xdd);
    r[2] = _mm512_shuffle_i32x4(j, l, 0x88), r[3] = _mm512_shuffle_i32x4(j, l, 0xdd);
}

static inline __m512i plus_row_sums(__m512i sums, __m512i numbers) {
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), numbers);
}

// As in portable.inl.
static void pack_units(const uint8_t *source, int64_t stride, bool transposed, int64_t inner, int64_t columns,
                       int64_t unit_elements, Right *numbers, int32_t *column_sum) {
    const int64_t groups = unit_elements / kGroupBytes;
    if (transposed) {
        for (int64_t c = 0; c < columns; c += 16, numbers += unit_elements) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t g = 0; g < groups; g += 16) {
                __m512i r[16];
                for (int64_t i = 0; i < 16; ++i)
                    r[i] = signed_bytes(source + (c + i) * stride + g * 4, c + i < columns ? inner - g * 4 : 0);
                transpose(r);
                for (int64_t i = 0; i < 16 && g + i < groups; ++i) {
                    _mm512_storeu_si512(numbers + (g + i) * kGroupBytes, r[i]);
                    sums = plus_row_sums(sums, r[i]);
                }
            }
            _mm512_storeu_si512(column_sum + c, sums);
        }
        return;
    }
    for (int64_t c = 0; c < columns; c += 64, numbers += 4 * unit_elements) {
        const int64_t units = (columns - c + 15) / 16 < 4 ? (columns - c + 15) / 16 : 4;
        __m512i sums[4] = {};
        for (int64_t g = 0; g < groups; ++g) {
            __m512i r[4];
            for (int64_t i = 0; i < 4; ++i)
                r[i] = signed_bytes(source + (g * 4 + i) * stride + c, g * 4 + i < inner ? columns - c : 0);
            interleave(r);
            for (int64_t u = 0; u < units; ++u) {
                _mm512_storeu_si512(numbers + u * unit_elements + g * kGroupBytes, r[u]);
                sums[u] = plus_row_sums(sums[u], r[u]);
            }
        }
        for (int64_t u = 0; u < units; ++u) _mm512_storeu_si512(column_sum + c + u * 16, sums[u]);
    }
}
