// Coefficients of GELU's polynomials, made when the library is loaded.

#include <cmath>

#include "kernels.h"

namespace fxq {

alignas(64) float gelu_table[kGeluDegree + 1][kGeluPieces];

namespace {

// x (Phi(x) - 1 / 2), the even part of GELU.
double even_part(double x) { return x * std::erf(x / std::sqrt(2.0)) / 2; }

// Interpolation at the Chebyshev points of each piece; the last piece is the line that GELU becomes.
bool filled = [] {
    constexpr int kPoints = kGeluDegree + 1;
    for (int piece = 0; piece < kGeluPieces; ++piece) {
        const double center = piece * double(kGeluStep);
        double points[kPoints], divided[kPoints];
        for (int i = 0; i < kPoints; ++i) {
            points[i] = kGeluStep / 2 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * kPoints));
            divided[i] = piece == kGeluPieces - 1 ? (center + points[i]) / 2 : even_part(std::fabs(center + points[i]));
        }
        for (int order = 1; order < kPoints; ++order)
            for (int i = kPoints - 1; i >= order; --i)
                divided[i] = (divided[i] - divided[i - 1]) / (points[i] - points[i - order]);
        double coefficients[kPoints] = {};  // Newton's form, multiplied out from the inside
        for (int i = kPoints - 1; i >= 0; --i) {
            for (int k = kPoints - 1; k > 0; --k) coefficients[k] = coefficients[k - 1] - points[i] * coefficients[k];
            coefficients[0] = divided[i] - points[i] * coefficients[0];
        }
        for (int k = 0; k < kPoints; ++k)
            gelu_table[k][piece] = static_cast<float>(coefficients[k] * std::pow(double(kGeluStep), k));
    }
    // Exactly a line, also far beyond the last point.
    for (int k = 2; k < kPoints; ++k) gelu_table[k][kGeluPieces - 1] = 0.0f;
    gelu_table[1][kGeluPieces - 1] = kGeluStep / 2;
    gelu_table[0][kGeluPieces - 1] = kGeluStep * (kGeluPieces - 1) / 2;
    return true;
}();

}  // namespace
}  // namespace fxq
