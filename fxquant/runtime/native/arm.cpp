// Which instructions an ARM processor has beside NEON, which all of 64 bits have; asked where each system keeps it.

#include "kernels.h"

#ifdef FXQ_NEON_EXTENSIONS

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#else
#include <sys/auxv.h>
#endif

namespace fxq {
namespace {

#if defined(__APPLE__)
bool has(const char *name) {
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value != 0;
}
#endif

}  // namespace

// Numbers and not names: headers of older systems do not know them all.
bool has_neon_dotprod() {
#if defined(__APPLE__)
    return has("hw.optional.arm.FEAT_DotProd");
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#endif
}

bool has_neon_i8mm() {
#if defined(__APPLE__)
    return has_neon_dotprod() && has("hw.optional.arm.FEAT_I8MM");
#elif defined(_WIN32)
    return has_neon_dotprod() && IsProcessorFeaturePresent(66);  // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
#else
    return has_neon_dotprod() && (getauxval(26) >> 13 & 1);  // AT_HWCAP2, HWCAP2_I8MM
#endif
}

}  // namespace fxq

#endif
