// The file that libfxquant runs: a model as a list of operations on tensors, written by fxquant/export.
//
//     FxqFile                                     what there is, and where
//     FxqTensor[tensors], FxqOperation[operations], FxqOutput[outputs]
//     text                                        names, each with a zero at its end
//     constants                                   layouts, chains, indices, vectors; each at a multiple of 64
//
// Tensor 0 is the image. Sizes of the image, and of what operations give, are those of one image: a run on n images has n
// times as much, one image after the other. Constants are the same for all. What operations give lies in one arena, at an
// offset that was planned when the file was written; on n images all offsets are n times as large.
#ifndef FXQUANT_PROGRAM_H
#define FXQUANT_PROGRAM_H

#include <string>
#include <vector>

#include "kernels.h"

namespace fxq {

constexpr uint32_t kProgramMagic = 0x4d515846, kProgramVersion = 1;
constexpr int64_t kAlignment = 64;
constexpr int kInputs = 6;

struct FxqFile {
    uint32_t magic, version;
    uint32_t layouts;      // kVersion of the layers' layouts
    uint32_t check;        // CRC-32 (that of zlib) of everything behind this number
    int64_t bytes;         // of the file
    int64_t image[3];      // channels, height, width
    int64_t arena_bytes;   // for one image
    int64_t tensors, operations, outputs;              // how many
    int64_t tensors_at, operations_at, outputs_at;     // where, multiples of 64
    int64_t text_at, text_bytes, name;                 // name: of the model, in the text
    FxqPreprocessing preprocessing;
};

enum TensorType { kFloat = 0, kByte = 1, kIndex = 2 };  // float32, uint8, int32
enum TensorPlace { kImage = 0, kConstant = 1, kArena = 2 };

struct FxqTensor {
    int32_t type, place;
    int64_t elements, offset;  // offset: in the file or in the arena, a multiple of 64
};

// Inputs are numbers of tensors, -1 for none; `c` marks those that have to be constants.
enum class Do : int32_t {
    quantize = 0,    // x, c quantizer
    move = 1,        // c index, one to five sources; sizes[0]: bytes of a piece. Piece i of the result is piece index[i] of
                     // all sources one after the other, or `fill` in all bytes where the index is -1
    linear = 2,      // codes, c layout, residual or none
    attention = 3,   // codes of q, k and v, c attention, c bias or none; sizes[0]: tokens
    layer_norm = 4,  // x, c quantizer, c weight or none, c bias or none; sizes[0]: channels
    norm = 5,        // x, none, c weight or none, c bias or none; sizes[0]: channels
    chain = 6,       // x, c chain; sizes[0]: tokens
    mean = 7,        // x; sizes[0]: rows, sizes[1]: channels
    add = 8,         // x, y: a tensor as large, or a constant that is repeated
    multiply = 9,
    divide = 10
};

struct FxqOperation {
    int32_t kind, result;  // kind: a Do
    int32_t input[kInputs];
    int64_t sizes[2];
    float epsilon;  // of norms
    int32_t fill;   // of moves
};

struct FxqOutput {
    int32_t tensor, rank;
    int64_t shape[FXQ_MAX_RANK];  // of one image
    int64_t name;                 // where in the text
};

static_assert(sizeof(FxqPreprocessing) == 40 && sizeof(FxqFile) == 168 && sizeof(FxqTensor) == 24 &&
                  sizeof(FxqOperation) == 56 && sizeof(FxqOutput) == 80,
              "records are as long as fxquant/runtime/native/program.py has them");

// A program whose every part was checked: no operation reads or writes outside of its tensors, on any number of images
// below `most_images`.
struct Program {
    const uint8_t *memory = nullptr;
    FxqFile file{};
    std::vector<FxqTensor> tensors;
    std::vector<FxqOperation> operations;
    std::vector<FxqOutput> outputs;

    int64_t image_elements() const { return tensors[0].elements; }
    // Images in one go: as many as have room in some megabytes, at least one.
    int64_t images_at_once(int64_t count) const;
    // Operation i on this many images. at: where each tensor lies.
    int32_t run(size_t i, int64_t images, const std::vector<uint8_t *> &at, int32_t threads) const;
};

inline int64_t element_bytes(const FxqTensor &tensor) { return tensor.type == kByte ? 1 : 4; }
inline int64_t tensor_bytes(const FxqTensor &tensor) { return tensor.elements * element_bytes(tensor); }

// Checks everything. why: one line for a person, where the status is not FXQ_OK.
int32_t open_program(const uint8_t *memory, int64_t bytes, Program *program, std::string *why);

// That one operation fits its tensors; these are checked by themselves already. Called by open_program.
int32_t check_operation(const Program &program, const FxqOperation &operation);

// As zlib's crc32.
uint32_t crc32(const uint8_t *bytes, int64_t count);

}  // namespace fxq

#endif
