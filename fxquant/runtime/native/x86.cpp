// Which instructions an x86 processor has, with registers that the system saves; asked of the processor itself.
//
// __builtin_cpu_supports only reads what the compiler's own library is to have found out before, and zig's finds nothing.

#include "kernels.h"

#ifdef FXQ_X86
#include <cpuid.h>
#ifdef FXQ_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fxq {
namespace {

// What CPUID answers; zeros to a question that the processor does not know.
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
    explicit Leaf(unsigned number, unsigned part = 0) {
        if (!__get_cpuid_count(number, part, &a, &b, &c, &d)) a = b = c = d = 0;
    }
};

template <class... Numbers>
constexpr unsigned bits(Numbers... numbers) {
    return ((1u << numbers) | ...);
}

bool has(unsigned found, unsigned wanted) { return (found & wanted) == wanted; }

// Which registers the system saves when it turns to another thread (XCR0).
bool saves(unsigned wanted) {
    constexpr unsigned kOsxsave = bits(27);
    if (!has(Leaf(1).c, kOsxsave)) return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return has(low, wanted);
}

}  // namespace

bool has_avx2() {
    constexpr unsigned kFma = bits(12), kAvx = bits(28), kAvx2 = bits(5), kSseAvx = bits(1, 2);
    return has(Leaf(1).c, kFma | kAvx) && has(Leaf(7).b, kAvx2) && saves(kSseAvx);
}

bool has_avx512_vnni() {
    constexpr unsigned kFDqBwVl = bits(16, 17, 30, 31), kVbmiVnni = bits(1, 11), kMasksAndHalves = bits(5, 6, 7);
    const Leaf leaf(7);
    return has_avx2() && has(leaf.b, kFDqBwVl) && has(leaf.c, kVbmiVnni) && saves(kMasksAndHalves);
}

bool has_avx_vnni() {
#ifdef FXQ_AVX_VNNI_AS
    return FXQ_AVX_VNNI_AS == 1 ? has_avx512_vnni() : has_avx2();
#else
    constexpr unsigned kAvxVnni = bits(4);
    return has_avx2() && has(Leaf(7, 1).a, kAvxVnni);
#endif
}

#ifdef FXQ_AMX
// Linux lets a process use the tile registers once it has asked.
bool has_amx() {
    constexpr unsigned kTileInt8 = bits(24, 25), kTiles = bits(17, 18);
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool permitted = has_avx512_vnni() && has(Leaf(7).d, kTileInt8) && saves(kTiles) &&
                                  syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
}
#endif

}  // namespace fxq

#endif
