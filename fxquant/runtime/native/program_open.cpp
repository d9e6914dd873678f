// A program's file is checked before anything of it runs: every offset, size, number and order.

#include <cstring>

#include "program.h"

namespace fxq {
namespace {

constexpr int64_t kMostRecords = 1 << 20, kMostArena = int64_t(1) << 36, kMostResize = 1 << 16;

struct Opening {
    const uint8_t *memory;
    int64_t bytes;
    Program *program;
    std::string why;

    int32_t refuse(const std::string &reason, int32_t status = FXQ_PROGRAM) {
        why = reason;
        return status;
    }
    bool fits(int64_t offset, int64_t count, int64_t size) const {
        return offset >= 0 && count >= 0 && offset <= bytes && count <= (bytes - offset) / size;
    }
    template <class Record>
    bool read(int64_t offset, int64_t count, std::vector<Record> *records) const {
        if (offset % kAlignment || count > kMostRecords || !fits(offset, count, int64_t(sizeof(Record)))) return false;
        records->resize(static_cast<size_t>(count));
        if (count) std::memcpy(records->data(), memory + offset, records->size() * sizeof(Record));
        return true;
    }
    bool is_text(int64_t at) const {  // what lies behind it ends, since the text does
        return at >= 0 && at < program->file.text_bytes;
    }
    int32_t header();
    int32_t tensors();
    int32_t operations();
    int32_t outputs();
};

// For images of so many channels. What is not known is all zeros.
bool is_preprocessing(const FxqPreprocessing &p, int64_t channels) {
    if (!p.known) {
        const FxqPreprocessing zeros = {};
        return std::memcmp(&p, &zeros, sizeof p) == 0;
    }
    bool is_one = p.known == 1 && (channels == 1 || channels == 3) && p.interpolation >= FXQ_NEAREST &&
                  p.interpolation <= FXQ_BICUBIC;
    for (const int32_t side : p.resize) is_one = is_one && is_size(side, kMostResize);
    for (int i = 0; i < channels && is_one; ++i) is_one = std::isfinite(p.mean[i]) && std::isfinite(p.std[i]) && p.std[i] != 0;
    return is_one;
}

int32_t Opening::header() {
    FxqFile &file = program->file;
    if (bytes < static_cast<int64_t>(sizeof file)) return refuse("it is shorter than any model");
    std::memcpy(&file, memory, sizeof file);
    if (file.magic != kProgramMagic) return refuse("it is no file that `fxquant export` wrote for this library");
    if (file.version != kProgramVersion || file.layouts != kVersion)
        return refuse("it is of another version: export it again with the fxquant that this library is of");
    if (file.bytes != bytes) return refuse("it was cut, or something was added to it");
    constexpr int64_t kChecked = offsetof(FxqFile, check) + 4;
    if (crc32(memory + kChecked, bytes - kChecked) != file.check) return refuse("it is damaged: its checksum is another");
    for (const int64_t size : file.image)
        if (!is_size(size)) return refuse("its image has a size that is none");
    if (file.arena_bytes < 0 || file.arena_bytes > kMostArena || file.arena_bytes % kAlignment)
        return refuse("its memory has a size that is none");
    if (!fits(file.text_at, file.text_bytes, 1) || file.text_bytes < 1 || memory[file.text_at + file.text_bytes - 1])
        return refuse("its names do not end");
    const FxqPreprocessing &p = file.preprocessing;
    if (!is_text(file.name) || !is_preprocessing(p, file.image[0]))
        return refuse("its name or its preprocessing is none");
    return FXQ_OK;
}

int32_t Opening::tensors() {
    std::vector<FxqTensor> &found = program->tensors;
    const FxqFile &file = program->file;
    if (file.tensors < 1 || !read(file.tensors_at, file.tensors, &found)) return refuse("its tensors lie outside of it");
    for (size_t i = 0; i < found.size(); ++i) {
        const FxqTensor &t = found[i];
        const bool is_known = t.type >= kFloat && t.type <= kIndex && t.place >= kImage && t.place <= kArena;
        const bool has_place = (t.place == kImage) == (i == 0) && (t.type != kIndex || t.place == kConstant);
        if (!is_known || !has_place || t.elements < 1 || t.elements > kMaxElements || t.offset < 0 || t.offset % kAlignment)
            return refuse("tensor " + std::to_string(i) + " is none");
        const int64_t end = t.place == kArena ? file.arena_bytes : bytes;
        if (t.place != kImage && (t.offset > end || t.elements > (end - t.offset) / element_bytes(t)))
            return refuse("tensor " + std::to_string(i) + " lies outside");
    }
    if (found[0].type != kFloat || found[0].elements != product(file.image[0], file.image[1], file.image[2]))
        return refuse("its first tensor is not its image");
    return FXQ_OK;
}

// Every operation reads what is there already, and writes a tensor of its own, away from those that it reads.
int32_t Opening::operations() {
    const FxqFile &file = program->file;
    if (!read(file.operations_at, file.operations, &program->operations)) return refuse("its operations lie outside of it");
    std::vector<bool> is_there(program->tensors.size());
    for (size_t i = 0; i < is_there.size(); ++i) is_there[i] = program->tensors[i].place != kArena;
    for (size_t i = 0; i < program->operations.size(); ++i) {
        const FxqOperation &operation = program->operations[i];
        const std::string name = "operation " + std::to_string(i);
        const auto is_tensor = [&](int32_t n) { return n >= 0 && static_cast<size_t>(n) < is_there.size(); };
        if (!is_tensor(operation.result) || is_there[size_t(operation.result)]) return refuse(name + " gives no new tensor");
        const FxqTensor &result = program->tensors[size_t(operation.result)];
        for (const int32_t input : operation.input) {
            if (input == -1) continue;
            if (!is_tensor(input) || !is_there[size_t(input)]) return refuse(name + " reads what is not there");
            const FxqTensor &t = program->tensors[size_t(input)];
            if (t.place == kArena && t.offset < result.offset + tensor_bytes(result) &&
                result.offset < t.offset + tensor_bytes(t))
                return refuse(name + " writes over what it reads");
        }
        if (const int32_t status = check_operation(*program, operation))
            return refuse(name + " does not fit its tensors: " + fxq_message(status));
        is_there[size_t(operation.result)] = true;
    }
    for (size_t i = 0; i < is_there.size(); ++i)
        if (!is_there[i]) return refuse("nothing gives tensor " + std::to_string(i));
    return FXQ_OK;
}

int32_t Opening::outputs() {
    const FxqFile &file = program->file;
    if (file.outputs < 1 || !read(file.outputs_at, file.outputs, &program->outputs)) return refuse("it has no outputs");
    for (const FxqOutput &output : program->outputs) {
        const bool is_tensor = output.tensor >= 0 && static_cast<size_t>(output.tensor) < program->tensors.size();
        if (!is_tensor || output.rank < 0 || output.rank > FXQ_MAX_RANK || !is_text(output.name))
            return refuse("it has an output that is none");
        const FxqTensor &t = program->tensors[size_t(output.tensor)];
        int64_t elements = 1;
        for (int32_t i = 0; i < output.rank; ++i) elements = product(elements, output.shape[i]);
        if (t.type != kFloat || t.place == kConstant || elements != t.elements)
            return refuse("it has an output of another shape than its tensor");
    }
    return FXQ_OK;
}

}  // namespace

int32_t open_program(const uint8_t *memory, int64_t bytes, Program *program, std::string *why) {
    if (reinterpret_cast<uintptr_t>(memory) % kAlignment) {
        *why = "its address is no multiple of 64";
        return FXQ_PROGRAM;
    }
    *program = Program();
    program->memory = memory;
    Opening opening{memory, bytes, program, ""};
    int32_t status = opening.header();
    if (!status) status = opening.tensors();
    if (!status) status = opening.operations();
    if (!status) status = opening.outputs();
    *why = opening.why;
    return status;
}

uint32_t crc32(const uint8_t *bytes, int64_t count) {
    static const std::vector<uint32_t> tables = [] {  // table k: what a byte adds k bytes later
        std::vector<uint32_t> made(8 * 256);
        for (uint32_t i = 0; i < 8 * 256; ++i) {
            uint32_t rest = i < 256 ? i : made[i - 256];
            if (i < 256)
                for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? 0xedb88320u : 0u);
            else rest = rest >> 8 ^ made[rest & 255];
            made[i] = rest;
        }
        return made;
    }();
    const uint32_t *const t = tables.data();
    uint32_t sum = ~0u;
    for (; count >= 8; bytes += 8, count -= 8) {
        uint32_t low, high;
        std::memcpy(&low, bytes, 4), std::memcpy(&high, bytes + 4, 4);
        low ^= sum;
        sum = t[7 * 256 + (low & 255)] ^ t[6 * 256 + (low >> 8 & 255)] ^ t[5 * 256 + (low >> 16 & 255)] ^ t[4 * 256 + (low >> 24)] ^
              t[3 * 256 + (high & 255)] ^ t[2 * 256 + (high >> 8 & 255)] ^ t[256 + (high >> 16 & 255)] ^ t[high >> 24];
    }
    for (; count > 0; ++bytes, --count) sum = sum >> 8 ^ t[(sum ^ *bytes) & 255];
    return ~sum;
}

}  // namespace fxq
