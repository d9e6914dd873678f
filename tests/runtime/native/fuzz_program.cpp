// Damages programs' files and runs what is not refused, on buffers of exactly the lengths that the library asks for:
// fuzz_program ROUNDS FILE.... Meant for AddressSanitizer and UndefinedBehaviorSanitizer; benchmarks/fuzz_programs.py builds
// and runs it. Checksums are put right after the damage, so that what is behind them is reached.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "program.h"

namespace {

std::mt19937_64 generator(0);
int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool one_in(int n) { return any(1, n) == 1; }

using Bytes = std::vector<uint8_t>;

Bytes read(const char *path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

int64_t number() {
    static const int64_t kOdd[] = {0, 1, -1, 2, 3, 63, 64, 255, 4096, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, int64_t(1) << 40};
    return one_in(2) ? kOdd[any(0, 13)] : any(-100, 100000);
}

// Somewhere: mostly where numbers say what lies where, else anywhere.
int64_t place(const Bytes &file, const fxq::FxqFile &head) {
    const int64_t end = static_cast<int64_t>(file.size());
    const int64_t places[] = {0, head.tensors_at, head.operations_at, head.outputs_at, end};
    const int64_t part = any(0, 4);
    if (part == 4) return any(0, end - 8);
    const int64_t from = std::min(std::max<int64_t>(places[part], 0), end - 8);
    const int64_t to = part == 3 ? from + 80 : std::min(std::max(places[part + 1], from), end - 8);
    return std::min(any(from, to), end - 8);
}

void damage(Bytes &file) {
    fxq::FxqFile head;
    std::memcpy(&head, file.data(), sizeof head);
    for (int64_t i = any(1, 3); i > 0; --i) {
        const int64_t at = place(file, head), kind = any(0, 5);
        if (kind == 0) file[size_t(at)] = static_cast<uint8_t>(any(0, 255));
        if (kind == 1) {
            const int32_t value = static_cast<int32_t>(number());
            std::memcpy(&file[size_t(at / 4 * 4)], &value, 4);
        }
        if (kind == 2) {
            const int64_t value = number();
            std::memcpy(&file[size_t(at / 8 * 8)], &value, 8);
        }
        if (kind == 3 || kind == 4) {  // a little more or less than it was, in four bytes or in eight
            int64_t value = 0;
            const size_t size = kind == 3 ? 4 : 8, where = size_t(at) / size * size;
            std::memcpy(&value, &file[where], size);
            value += any(-64, 64);
            std::memcpy(&file[where], &value, size);
        }
        if (kind == 5) {  // as it stands elsewhere
            const int64_t from = place(file, head);
            std::memmove(&file[size_t(at / 8 * 8)], &file[size_t(from / 8 * 8)], 8);
        }
    }
    if (one_in(20)) file.resize(size_t(any(1, int64_t(file.size()))));
    const int64_t size = static_cast<int64_t>(file.size());
    if (size < static_cast<int64_t>(sizeof head) || one_in(20)) return;
    std::memcpy(&head, file.data(), sizeof head);
    if (!one_in(50)) head.bytes = size;
    std::memcpy(file.data(), &head, sizeof head);
    constexpr int64_t kChecked = offsetof(fxq::FxqFile, check) + 4;
    head.check = fxq::crc32(file.data() + kChecked, size - kChecked);
    std::memcpy(file.data(), &head, sizeof head);
}

// Whether it was opened, and whether it ran.
struct Found {
    bool is_open, is_run;
};

Found run(const Bytes &file) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 64, file.size())) std::exit(1);
    std::memcpy(memory, file.data(), file.size());
    FxqModel *model = nullptr;
    Found found{fxq_open_memory(memory, int64_t(file.size()), &model) == FXQ_OK, false};
    if (found.is_open) {
        int64_t shape[3], rank[FXQ_MAX_RANK];
        fxq_image_shape(model, shape);
        const int64_t elements = shape[0] * shape[1] * shape[2], count = any(0, 3);
        std::vector<float> images(size_t(count * elements) + 1);
        for (float &x : images) x = one_in(1000) ? float(number()) : float(any(-300, 300)) / 100;
        std::vector<std::vector<float>> outputs;
        std::vector<float *> at;
        for (int32_t i = 0; i < fxq_output_count(model); ++i) {
            outputs.emplace_back(size_t(count * fxq_output_elements(model, i)));
            outputs.back().reserve(1);
            if (std::strlen(fxq_output_name(model, i)) > file.size() || fxq_output_shape(model, i, rank) < 0) std::abort();
        }
        for (std::vector<float> &output : outputs) at.push_back(output.data());
        images.resize(size_t(count * elements)), images.shrink_to_fit(), images.reserve(1);
        found.is_run = fxq_run(model, images.data(), count, at.data(), int32_t(any(1, 2))) == FXQ_OK;
    }
    fxq_close(model);
    std::free(memory);
    return found;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 3) return std::fprintf(stderr, "usage: fuzz_program ROUNDS FILE...\n"), 2;
    int64_t opened = 0, ran = 0;
    std::vector<Bytes> files;
    for (int i = 2; i < count; ++i) {
        files.push_back(read(arguments[i]));
        if (!run(files.back()).is_run) return std::fprintf(stderr, "%s: %s\n", arguments[i], fxq_last_error()), 1;
    }
    const int64_t rounds = std::atoll(arguments[1]);
    for (int64_t i = 0; i < rounds; ++i) {
        Bytes file = files[size_t(any(0, int64_t(files.size()) - 1))];
        damage(file);
        const Found found = run(file);
        opened += found.is_open, ran += found.is_run;
    }
    std::printf("%lld damaged programs: %lld refused, %lld ran, no fault\n", static_cast<long long>(rounds),
                static_cast<long long>(rounds - opened), static_cast<long long>(ran));
}
