// The interface of libfxquant: a file is mapped and checked, then its program runs on images.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#if !defined(_WIN32)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <malloc.h>
#endif

#include "program.h"

using namespace fxq;

namespace {

thread_local char last_error[512] = "";

// Takes no memory, so that it can tell that there is none.
int32_t fail(int32_t status, const char *what) {
    std::snprintf(last_error, sizeof last_error, "%s", what);
    return status;
}

int32_t fail(int32_t status, const std::string &what) { return fail(status, what.c_str()); }

// Memory at a multiple of 64; null without.
void *aligned(int64_t bytes) {
    const size_t size = static_cast<size_t>(round_up(std::max<int64_t>(bytes, 1), kAlignment));
#if defined(_WIN32)
    return _aligned_malloc(size, kAlignment);
#else
    return std::aligned_alloc(kAlignment, size);
#endif
}

void release(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

struct Aligned {
    void *memory = nullptr;
    int64_t bytes = 0;
    ~Aligned() { release(memory); }
    bool grow(int64_t wanted) {
        if (wanted <= bytes) return true;
        release(memory);
        memory = aligned(wanted);
        bytes = memory ? wanted : 0;
        return memory != nullptr;
    }
};

#if defined(_WIN32)
// Reads the file; it is not mapped here.
struct File {
    Aligned content;
    const uint8_t *memory = nullptr;
    int64_t bytes = 0;
    bool open(const char *path) {
        FILE *const file = std::fopen(path, "rb");
        if (!file) return false;
        const bool is_sized = _fseeki64(file, 0, SEEK_END) == 0;
        bytes = is_sized ? _ftelli64(file) : -1;
        const bool is_read = bytes >= 0 && _fseeki64(file, 0, SEEK_SET) == 0 && content.grow(std::max<int64_t>(bytes, 1)) &&
                             std::fread(content.memory, 1, size_t(bytes), file) == size_t(bytes);
        std::fclose(file);
        memory = static_cast<const uint8_t *>(content.memory);
        return is_read;
    }
};
#else
struct File {
    const uint8_t *memory = nullptr;
    int64_t bytes = 0;
    ~File() {
        if (memory) munmap(const_cast<uint8_t *>(memory), size_t(bytes));
    }
    bool open(const char *path) {
        const int file = ::open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) return false;
        struct stat found;
        void *mapped = MAP_FAILED;
        if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_size > 0)
            mapped = mmap(nullptr, size_t(found.st_size), PROT_READ, MAP_PRIVATE, file, 0);
        ::close(file);
        if (mapped == MAP_FAILED) return false;
        memory = static_cast<const uint8_t *>(mapped), bytes = found.st_size;
        return true;
    }
};
#endif

bool is_finite(const float *image, int64_t elements) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < elements; ++i) {
        uint32_t bits;
        std::memcpy(&bits, image + i, 4);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    return largest < 0x7f800000u;
}

}  // namespace

struct FxqModel {
    File file;
    Program program;
    Aligned arena;
};

namespace {

// Opens what lies at `memory`, which `model` may own.
int32_t open_model(std::unique_ptr<FxqModel> model, const uint8_t *memory, int64_t bytes, const char *name, FxqModel **found) {
    std::string why;
    if (const int32_t status = open_program(memory, bytes, &model->program, &why)) return fail(status, name + (": " + why));
    *found = model.release();
    return FXQ_OK;
}

const FxqOutput *output_of(const FxqModel *model, int32_t output) {
    const bool is_one = model && output >= 0 && static_cast<size_t>(output) < model->program.outputs.size();
    return is_one ? &model->program.outputs[size_t(output)] : nullptr;
}

const char *text_at(const FxqModel *model, int64_t place) {
    return reinterpret_cast<const char *>(model->program.memory + model->program.file.text_at + place);
}

// Images from number `first` on.
int32_t run_images(FxqModel *model, const float *images, int64_t first, int64_t count, float *const *outputs, int32_t threads) {
    const Program &program = model->program;
    const int64_t elements = program.image_elements();
    std::vector<uint8_t *> at;
    for (const FxqTensor &t : program.tensors) {
        // Images and constants are only read.
        if (t.place == kImage) at.push_back(reinterpret_cast<uint8_t *>(const_cast<float *>(images + first * elements)));
        else if (t.place == kConstant) at.push_back(const_cast<uint8_t *>(program.memory + t.offset));
        else at.push_back(static_cast<uint8_t *>(model->arena.memory) + t.offset * count);
    }
    for (size_t i = 0; i < program.operations.size(); ++i)
        if (const int32_t status = program.run(i, count, at, threads))
            return fail(status, "operation " + std::to_string(i) + ": " + fxq_message(status));
    for (size_t o = 0; o < program.outputs.size(); ++o) {
        const FxqTensor &t = program.tensors[size_t(program.outputs[o].tensor)];
        std::memcpy(outputs[o] + first * t.elements, at[size_t(program.outputs[o].tensor)],
                    static_cast<size_t>(count * tensor_bytes(t)));
    }
    for (int64_t i = first; i < first + count; ++i) {
        if (is_finite(images + i * elements, elements)) continue;
        for (size_t o = 0; o < program.outputs.size(); ++o) {
            const int64_t numbers = program.tensors[size_t(program.outputs[o].tensor)].elements;
            std::fill_n(outputs[o] + i * numbers, numbers, std::numeric_limits<float>::quiet_NaN());
        }
    }
    return FXQ_OK;
}

}  // namespace

int32_t fxq_open(const char *path, FxqModel **model) try {
    if (!model) return fail(FXQ_NULL, "fxq_open: model is null");
    *model = nullptr;
    if (!path) return fail(FXQ_NULL, "fxq_open: path is null");
    std::unique_ptr<FxqModel> made(new FxqModel);
    if (!made->file.open(path)) return fail(FXQ_FILE, path + std::string(": it is not there, empty, or cannot be read"));
    const uint8_t *const memory = made->file.memory;
    const int64_t bytes = made->file.bytes;
    return open_model(std::move(made), memory, bytes, path, model);
} catch (...) {
    return fail(FXQ_MEMORY, "fxq_open: out of memory");
}

int32_t fxq_open_memory(const void *content, int64_t bytes, FxqModel **model) try {
    if (!model) return fail(FXQ_NULL, "fxq_open_memory: model is null");
    *model = nullptr;
    if (!content) return fail(FXQ_NULL, "fxq_open_memory: content is null");
    std::unique_ptr<FxqModel> made(new FxqModel);
    return open_model(std::move(made), static_cast<const uint8_t *>(content), bytes, "the model", model);
} catch (...) {
    return fail(FXQ_MEMORY, "fxq_open_memory: out of memory");
}

void fxq_close(FxqModel *model) { delete model; }

const char *fxq_last_error(void) { return last_error; }

const char *fxq_model_name(const FxqModel *model) { return model ? text_at(model, model->program.file.name) : ""; }

void fxq_image_shape(const FxqModel *model, int64_t shape[3]) {
    for (int i = 0; i < 3; ++i) shape[i] = model ? model->program.file.image[i] : 0;
}

const FxqPreprocessing *fxq_preprocessing(const FxqModel *model) {
    return model ? &model->program.file.preprocessing : nullptr;
}

int32_t fxq_output_count(const FxqModel *model) {
    return model ? static_cast<int32_t>(model->program.outputs.size()) : 0;
}

const char *fxq_output_name(const FxqModel *model, int32_t output) {
    const FxqOutput *const found = output_of(model, output);
    return found ? text_at(model, found->name) : "";
}

int64_t fxq_output_elements(const FxqModel *model, int32_t output) {
    const FxqOutput *const found = output_of(model, output);
    return found ? model->program.tensors[size_t(found->tensor)].elements : 0;
}

int32_t fxq_output_shape(const FxqModel *model, int32_t output, int64_t shape[FXQ_MAX_RANK]) {
    const FxqOutput *const found = output_of(model, output);
    if (found) std::copy_n(found->shape, FXQ_MAX_RANK, shape);
    return found ? found->rank : 0;
}

int32_t fxq_run(FxqModel *model, const float *images, int64_t count, float *const *outputs, int32_t threads) try {
    if (!model || !images || !outputs) return fail(FXQ_NULL, "fxq_run: a pointer is null");
    for (size_t i = 0; i < model->program.outputs.size(); ++i)
        if (!outputs[i]) return fail(FXQ_NULL, "fxq_run: an output is null");
    if (count < 0 || count > kMaxSize || threads < 1) return fail(FXQ_SIZE, "fxq_run: count or threads is out of range");
    const int64_t most = model->program.images_at_once(std::max<int64_t>(count, 1));
    if (!model->arena.grow(most * model->program.file.arena_bytes)) return fail(FXQ_MEMORY, "fxq_run: out of memory");
    for (int64_t first = 0; first < count; first += most) {
        const int64_t some = std::min(most, count - first);
        if (const int32_t status = run_images(model, images, first, some, outputs, threads)) return status;
    }
    return FXQ_OK;
} catch (...) {
    return fail(FXQ_MEMORY, "fxq_run: out of memory");
}
