// What sets with the compiler's own vectors share: sums of floats in the order that all sets keep, codebooks.

#include "sums.inl"

// Of 32 partial sums.
static FXQ_INLINE float sum_of(const Vec *sums) {
    const float *lanes = reinterpret_cast<const float *>(sums);
    return sum_of(*reinterpret_cast<const Lanes *>(lanes) + *reinterpret_cast<const Lanes *>(lanes + 16));
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
