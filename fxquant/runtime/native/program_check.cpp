// Whether an operation of a program fits its tensors, for any number of images.

#include <cstring>

#include "program.h"

namespace fxq {
namespace {

struct Check {
    const Program &program;
    const FxqOperation &operation;

    const FxqTensor *input(int i) const {
        const int32_t number = operation.input[i];
        return number < 0 ? nullptr : &program.tensors[size_t(number)];
    }
    const FxqTensor &result() const { return program.tensors[size_t(operation.result)]; }

    // What images have numbers of their own of.
    bool is_data(int i, int32_t type) const {
        const FxqTensor *t = input(i);
        return t && t->type == type && t->place != kConstant;
    }
    bool is_constant(int i, int32_t type) const {
        const FxqTensor *t = input(i);
        return t && t->type == type && t->place == kConstant;
    }
    bool has_inputs_below(int count) const {
        for (int i = count; i < kInputs; ++i)
            if (operation.input[i] != -1) return false;
        return true;
    }
    bool gives(int32_t type, int64_t elements) const { return result().type == type && result().elements == elements; }
    bool is_vector(int i, int64_t elements) const {  // or not there
        return !input(i) || (is_constant(i, kFloat) && input(i)->elements == elements);
    }
    const uint8_t *bytes(int i) const { return program.memory + input(i)->offset; }
    template <class Spec>
    bool copy(int i, Spec *spec) const {
        if (!is_constant(i, kByte) || input(i)->elements != static_cast<int64_t>(sizeof(Spec))) return false;
        std::memcpy(spec, bytes(i), sizeof(Spec));
        return true;
    }

    int32_t quantize() const {
        FxqQuantizer quantizer;
        if (!is_data(0, kFloat) || !has_inputs_below(2) || !gives(kByte, input(0)->elements)) return FXQ_SIZE;
        return copy(1, &quantizer) && is_quantizer(quantizer) ? FXQ_OK : FXQ_QUANTIZER;
    }

    int32_t norm(bool gives_codes) const {
        const int64_t channels = operation.sizes[0];
        FxqQuantizer quantizer;
        if (gives_codes ? !copy(1, &quantizer) || !is_quantizer(quantizer) : input(1) != nullptr) return FXQ_QUANTIZER;
        if (!std::isfinite(operation.epsilon) || operation.epsilon < 0) return FXQ_QUANTIZER;
        if (!is_data(0, kFloat) || !is_size(channels) || input(0)->elements % channels || !has_inputs_below(4)) return FXQ_SIZE;
        return is_vector(2, channels) && is_vector(3, channels) && gives(gives_codes ? kByte : kFloat, input(0)->elements)
                   ? FXQ_OK
                   : FXQ_SIZE;
    }

    int32_t linear() const {
        if (!is_data(0, kByte) || !is_constant(1, kByte) || !has_inputs_below(3)) return FXQ_SIZE;
        FxqLinear spec;
        if (const int32_t status = open_linear(bytes(1), input(1)->elements, &spec)) return status;
        const int64_t elements = product(input(0)->elements / spec.in_features, spec.out_features);
        const bool adds = spec.epilogue == FXQ_RESIDUAL, is_float = adds || spec.epilogue == FXQ_FLOAT;
        if (input(0)->elements % spec.in_features || !gives(is_float ? kFloat : kByte, elements)) return FXQ_SIZE;
        if (!adds) return input(2) ? FXQ_SIZE : FXQ_OK;
        return is_data(2, kFloat) && input(2)->elements == elements ? FXQ_OK : FXQ_SIZE;
    }

    int32_t attention() const {
        const int64_t tokens = operation.sizes[0];
        FxqAttention spec;
        if (!copy(1, &spec)) return FXQ_QUANTIZER;
        if (const int32_t status = check(spec)) return status;
        if (!is_data(0, kByte) || !is_size(tokens, FXQ_MAX_INNER) || !has_inputs_below(3)) return FXQ_SIZE;
        const int64_t image = product(tokens, spec.heads, spec.head_size);
        if (image < 1 || input(0)->elements % (3 * image) || !gives(kByte, input(0)->elements / 3)) return FXQ_SIZE;
        if (!input(2)) return FXQ_OK;
        const int64_t group = product(spec.heads, tokens, tokens), images = result().elements / image;
        if (group < 1 || !is_constant(2, kFloat) || input(2)->elements % group) return FXQ_SIZE;
        return images % (input(2)->elements / group) ? FXQ_SIZE : FXQ_OK;
    }

    int32_t chain() const {
        const int64_t tokens = operation.sizes[0];
        ChainRows rows;
        if (!is_data(0, kFloat) || !is_constant(1, kByte) || !is_size(tokens) || !has_inputs_below(2)) return FXQ_SIZE;
        if (input(1)->elements < static_cast<int64_t>(sizeof(FxqChain))) return FXQ_LAYOUT;
        FxqChain header;
        std::memcpy(&header, bytes(1), sizeof header);
        if (!is_size(header.channels)) return FXQ_SIZE;
        const int64_t image = product(header.channels, tokens);
        if (image < 1 || input(0)->elements % image) return FXQ_SIZE;
        const int64_t images = input(0)->elements / image;
        if (const int32_t status = check_chain(bytes(1), input(1)->elements, images, tokens, &rows)) return status;
        return gives(rows.element_bytes == 4 ? kFloat : kByte, product(images, tokens, rows.width)) ? FXQ_OK : FXQ_SIZE;
    }

    int32_t move() const {
        const int64_t piece = operation.sizes[0];
        if (!is_constant(0, kIndex) || !is_size(piece) || !is_byte(operation.fill)) return FXQ_SIZE;
        int64_t pieces = 0;
        for (int i = 1; i < kInputs; ++i) {
            if (!input(i)) continue;
            if (i > 1 && !input(i - 1)) return FXQ_SIZE;
            if (input(i)->type != result().type || tensor_bytes(*input(i)) % piece) return FXQ_SIZE;
            pieces += tensor_bytes(*input(i)) / piece;
        }
        if (!input(1) || product(input(0)->elements, piece) != tensor_bytes(result())) return FXQ_SIZE;
        const int32_t *const index = reinterpret_cast<const int32_t *>(bytes(0));
        for (int64_t i = 0; i < input(0)->elements; ++i)
            if (index[i] < -1 || index[i] >= pieces) return FXQ_SIZE;
        return FXQ_OK;
    }

    int32_t mean() const {
        const int64_t rows = operation.sizes[0], channels = operation.sizes[1];
        if (!is_data(0, kFloat) || !is_size(rows) || !is_size(channels) || !has_inputs_below(1)) return FXQ_SIZE;
        const int64_t image = product(rows, channels);
        if (image < 1 || input(0)->elements % image) return FXQ_SIZE;
        return gives(kFloat, input(0)->elements / rows) ? FXQ_OK : FXQ_SIZE;
    }

    int32_t arithmetic() const {
        if (!is_data(0, kFloat) || !has_inputs_below(2) || !gives(kFloat, input(0)->elements)) return FXQ_SIZE;
        if (is_data(1, kFloat)) return input(1)->elements == input(0)->elements ? FXQ_OK : FXQ_SIZE;
        return is_constant(1, kFloat) && input(0)->elements % input(1)->elements == 0 ? FXQ_OK : FXQ_SIZE;
    }
};

}  // namespace

int32_t check_operation(const Program &program, const FxqOperation &operation) {
    const Check check{program, operation};
    if (operation.kind != static_cast<int32_t>(Do::move) && operation.fill) return FXQ_SIZE;
    switch (static_cast<Do>(operation.kind)) {
        case Do::quantize: return check.quantize();
        case Do::move: return check.move();
        case Do::linear: return check.linear();
        case Do::attention: return check.attention();
        case Do::layer_norm: return check.norm(true);
        case Do::norm: return check.norm(false);
        case Do::chain: return check.chain();
        case Do::mean: return check.mean();
        case Do::add:
        case Do::multiply:
        case Do::divide: return check.arithmetic();
        default: return FXQ_UNSUPPORTED;
    }
}

}  // namespace fxq
