// Layouts of linear layers: weights as bit planes, scales in the units of what follows.

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace fxq {
namespace {

// Bit planes of one tile of 512 codes, in the order `unpack_tiles` reads them.
void pack_tile(const uint8_t *codes, int32_t bits, uint8_t *out) {
    if (bits == 8) {
        std::memcpy(out, codes, 512);
        return;
    }
    std::memset(out, 0, 64 * bits);
    int shift = 0;
    for (const int plane : {4, 2, 1}) {
        if (!(bits & plane)) continue;
        const int per_byte = 8 / plane;
        for (int i = 0; i < 512; ++i) {
            const int group = i / 64;
            const int part = (codes[i] >> shift) & ((1 << plane) - 1);
            out[group / per_byte * 64 + i % 64] |= static_cast<uint8_t>(part << (group % per_byte * plane));
        }
        out += 64 * plane;
        shift += plane;
    }
}

void pack_weights(const FxqLinear &spec, const int8_t *codes, const LinearPlaces &places, uint8_t *layout) {
    int32_t *sums = reinterpret_cast<int32_t *>(layout + places.weight_sum);
    uint8_t tile[512], *out = layout + places.weights;
    for (int64_t unit = 0; unit < places.units; ++unit)
        for (int64_t t = 0; t < places.tiles; ++t, out += 64 * spec.weight_bits) {
            std::memset(tile, 0, sizeof tile);
            for (int64_t c = 0; c < kUnit && unit * kUnit + c < spec.out_features; ++c) {
                const int64_t row = unit * kUnit + c, first = t * kTileInputs;
                for (int64_t k = 0; k < kTileInputs && first + k < spec.in_features; ++k) {
                    const int8_t code = codes[row * spec.in_features + first + k];
                    sums[row] += code;
                    tile[k / 4 * 64 + c * 4 + k % 4] = static_cast<uint8_t>(code);
                }
            }
            pack_tile(tile, spec.weight_bits, out);
        }
}

}  // namespace
}  // namespace fxq

using namespace fxq;

int64_t fxq_linear_bytes(const FxqLinear *spec) {
    return spec && check(*spec) == FXQ_OK ? LinearPlaces(*spec).total : 0;
}

int32_t fxq_linear_pack(const FxqLinear *spec, const int8_t *codes, int64_t code_bytes, const float *scale,
                        const float *bias, int64_t vector_bytes, const uint8_t *table, int64_t table_bytes,
                        uint8_t *layout, int64_t layout_bytes) {
    if (!spec || !codes || !scale || !layout) return FXQ_NULL;
    if (const int32_t status = check(*spec)) return status;
    const int64_t out = spec->out_features, count = out * spec->in_features;
    const LinearPlaces places(*spec);
    if (table_bytes != places.table_bytes) return FXQ_SIZE;
    if (table_bytes && !table) return FXQ_NULL;
    if (code_bytes != count || vector_bytes != out * 4 || layout_bytes != places.total) return FXQ_SIZE;
    const int limit = 1 << (spec->weight_bits - 1);
    for (int64_t i = 0; i < count; ++i)
        if (codes[i] < -limit || codes[i] >= limit) return FXQ_WIDTH;
    for (int64_t i = 0; i < out; ++i)
        if (!std::isfinite(scale[i]) || (bias && !std::isfinite(bias[i]))) return FXQ_QUANTIZER;
    std::memset(layout, 0, static_cast<size_t>(layout_bytes));
    const LinearHeader header{kMagic, kVersion, *spec};
    std::memcpy(layout, &header, sizeof header);
    pack_weights(*spec, codes, places, layout);
    if (table_bytes) std::memcpy(layout + places.table, table, static_cast<size_t>(table_bytes));
    const auto vector_at = [&](int64_t place) { return reinterpret_cast<float *>(layout + place); };
    float *scales = vector_at(places.scale), *biases = vector_at(places.bias), *lows = vector_at(places.columns);
    float *highs = lows + places.vector / 4;
    int32_t *zeros = reinterpret_cast<int32_t *>(highs + places.vector / 4);
    for (int64_t i = 0; i < out; ++i) {
        // What follows takes numbers in units of its own: a quantizer's scale, the step of GELU's table.
        double factor = spec->epilogue == FXQ_GELU_CODES ? 1 / double(kGeluStep) : 1.0;
        if (spec->epilogue == FXQ_CODES) {
            const int64_t range = i / (out / spec->ranges);
            const FxqQuantizer &q = spec->output[range];
            factor = double(spec->factor[range]) / double(q.scale);
            lows[i] = float(q.low - q.zero), highs[i] = float(q.high - q.zero), zeros[i] = q.zero;
        }
        scales[i] = static_cast<float>(double(scale[i]) * double(spec->input.unit) * factor);
        biases[i] = bias ? static_cast<float>(double(bias[i]) * factor) : 0.0f;
    }
    return FXQ_OK;
}
