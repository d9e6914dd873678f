/* An example of libfxquant: the classes that a model sees in a picture.

       classify model.fxm picture.ppm [how many classes]

   Prints the best classes, best first, each with its score, and to the error output how long it took. Pictures are PPM (P6)
   or PGM (P5) files of 8 bits, such as `magick picture.jpg picture.ppm` writes. They become the model's input as the file
   says, and bit for bit as Pillow and torchvision would make it: resized by an antialiasing filter in fixed point, first
   across, then down; the middle cut out; pixels in 0..1 less mean, through standard deviation. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fxquant.h"

typedef struct {
    int width, height, channels; /* 1 or 3, which lie side by side */
    unsigned char *pixels;
} Picture;

static void stop(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void *memory(size_t bytes) {
    void *found = malloc(bytes ? bytes : 1);
    if (!found) stop("classify", "out of memory");
    return found;
}

static double milliseconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

/* A number of the header, behind white space and comments. */
static int number(FILE *file, const char *path) {
    int c = fgetc(file), found = 0;
    for (; isspace(c) || c == '#'; c = fgetc(file))
        if (c == '#')
            while (c != '\n' && c != EOF) c = fgetc(file);
    for (; isdigit(c) && found < 1000000; c = fgetc(file)) found = found * 10 + (c - '0');
    if (!isspace(c)) stop(path, "this is no PPM or PGM file of 8 bits");
    return found;
}

static Picture read_picture(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) stop(path, "it cannot be opened");
    Picture p;
    const int letter = fgetc(file), kind = fgetc(file);
    if (letter != 'P' || (kind != '5' && kind != '6')) stop(path, "this is no PPM or PGM file of 8 bits");
    p.channels = kind == '6' ? 3 : 1;
    p.width = number(file, path), p.height = number(file, path);
    if (number(file, path) != 255 || p.width < 1 || p.height < 1 || p.width > 32768 || p.height > 32768)
        stop(path, "this is no PPM or PGM file of 8 bits, or it is too large");
    const size_t bytes = (size_t)p.width * (size_t)p.height * (size_t)p.channels;
    p.pixels = memory(bytes);
    if (fread(p.pixels, 1, bytes, file) != bytes) stop(path, "the file ends before the picture");
    fclose(file);
    return p;
}

/* Grey for models of one channel, three channels for the others. */
static Picture with_channels(Picture p, int channels) {
    if (p.channels == channels) return p;
    const size_t count = (size_t)p.width * (size_t)p.height;
    Picture made = {p.width, p.height, channels, memory(count * (size_t)channels)};
    for (size_t i = 0; i < count; ++i) {
        const unsigned char *from = p.pixels + i * (size_t)p.channels;
        if (channels == 3) memset(made.pixels + i * 3, from[0], 3);
        else made.pixels[i] = (unsigned char)((from[0] * 19595 + from[1] * 38470 + from[2] * 7471 + 0x8000) >> 16);
    }
    free(p.pixels);
    return made;
}

/* Weight of a pixel that lies x pixels of the coarser picture away. */
static double weight(int interpolation, double x) {
    x = fabs(x);
    if (interpolation == FXQ_BILINEAR) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1; /* Keys' cubic, a = -1/2 */
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

enum { FRACTION_BITS = 22 };

typedef struct {
    int first, count;
    int weights[];
} Taps;

/* Which pixels of a line of `size` become pixel i of a line of `wanted`, and their shares, in fixed point. */
static Taps *taps_for(int i, int size, int wanted, int interpolation) {
    const double scale = (double)size / wanted, coarse = scale > 1 ? scale : 1, center = (i + 0.5) * scale;
    const double reach = (interpolation == FXQ_BICUBIC ? 2 : 1) * coarse;
    int first = (int)(center - reach + 0.5), end = (int)(center + reach + 0.5);
    first = first < 0 ? 0 : first, end = end > size ? size : end;
    if (interpolation == FXQ_NEAREST) { /* by steps, as Pillow goes: their rounding decides where pixels meet */
        double at = 0.5 * scale;
        for (int step = 0; step < i; ++step) at += scale;
        first = at < size ? (int)at : size - 1, end = first + 1;
    }
    const int count = end - first;
    Taps *taps = memory(sizeof(Taps) + sizeof(int) * (size_t)count);
    double *shares = memory(sizeof(double) * (size_t)count), sum = 0;
    for (int k = 0; k < count; ++k) {
        shares[k] = interpolation == FXQ_NEAREST ? 1 : weight(interpolation, (k + first - center + 0.5) * (1 / coarse));
        sum += shares[k];
    }
    for (int k = 0; k < count; ++k) {
        const double share = shares[k] / sum * (1 << FRACTION_BITS);
        taps->weights[k] = (int)(share < 0 ? share - 0.5 : share + 0.5);
    }
    taps->first = first, taps->count = count;
    free(shares);
    return taps;
}

/* The picture with `wanted` pixels across, or down. */
static Picture resized(Picture p, int wanted, int is_down, int interpolation) {
    const int size = is_down ? p.height : p.width, lines = is_down ? p.width : p.height;
    if (size == wanted) return p;
    Picture made = {is_down ? p.width : wanted, is_down ? wanted : p.height, p.channels, NULL};
    made.pixels = memory((size_t)made.width * (size_t)made.height * (size_t)p.channels);
    const size_t step = (size_t)p.channels * (is_down ? (size_t)p.width : 1), next = (size_t)p.channels * (is_down ? 1 : (size_t)p.width);
    const size_t out_step = is_down ? step : (size_t)p.channels, out_next = (size_t)p.channels * (is_down ? 1 : (size_t)wanted);
    for (int i = 0; i < wanted; ++i) {
        Taps *taps = taps_for(i, size, wanted, interpolation);
        for (int line = 0; line < lines; ++line)
            for (int c = 0; c < p.channels; ++c) {
                const unsigned char *from = p.pixels + (size_t)line * next + (size_t)c + (size_t)taps->first * step;
                int sum = 1 << (FRACTION_BITS - 1);
                for (int k = 0; k < taps->count; ++k) sum += from[(size_t)k * step] * taps->weights[k];
                sum = sum < 0 ? 0 : sum >> FRACTION_BITS;
                made.pixels[(size_t)line * out_next + (size_t)c + (size_t)i * out_step] = (unsigned char)(sum > 255 ? 255 : sum);
            }
        free(taps);
    }
    free(p.pixels);
    return made;
}

/* Half of what is left over at both sides; where that is no whole number, the even one of the two around it. */
static int margin(int over) { return over / 2 + (over % 2 && over / 2 % 2); }

static float *input_of(Picture p, const FxqModel *model, const char *path) {
    const struct FxqPreprocessing *how = fxq_preprocessing(model);
    int64_t shape[3];
    fxq_image_shape(model, shape);
    if (!how->known || how->resize[0] != how->resize[1] || shape[1] != shape[2])
        stop(path, "the model's file does not say how a picture becomes a square input");
    const int channels = (int)shape[0], size = (int)shape[1], side = how->resize[0];
    p = with_channels(p, channels);
    const int is_wide = p.width > p.height;
    const int longer = (int)((double)side * (is_wide ? p.width : p.height) / (is_wide ? p.height : p.width));
    const int height = is_wide ? side : longer;
    p = resized(p, is_wide ? longer : side, 0, how->interpolation);
    p = resized(p, height, 1, how->interpolation);
    if (p.width < size || p.height < size) stop(path, "the model's file asks for a crop that is larger than the picture");
    const int left = margin(p.width - size), top = margin(p.height - size);
    float *input = memory(sizeof(float) * (size_t)channels * (size_t)size * (size_t)size), *to = input;
    for (int c = 0; c < channels; ++c)
        for (int y = 0; y < size; ++y)
            for (int x = 0; x < size; ++x) {
                const size_t at = ((size_t)(top + y) * (size_t)p.width + (size_t)(left + x)) * (size_t)channels + (size_t)c;
                *to++ = ((float)p.pixels[at] / 255.0f - how->mean[c]) / how->std[c];
            }
    free(p.pixels);
    return input;
}

int main(int count, char **arguments) {
    if (count < 3) stop("usage", "classify model.fxm picture.ppm [how many classes]");
    const Picture picture = read_picture(arguments[2]);
    const double start = milliseconds();
    FxqModel *model;
    if (fxq_open(arguments[1], &model) != FXQ_OK) stop("classify", fxq_last_error());
    const double opened = milliseconds();
    float *input = input_of(picture, model, arguments[2]);
    const double prepared = milliseconds();
    const int outputs = fxq_output_count(model);
    float **scores = memory(sizeof(float *) * (size_t)outputs);
    for (int i = 0; i < outputs; ++i) scores[i] = memory(sizeof(float) * (size_t)fxq_output_elements(model, i));
    if (fxq_run(model, input, 1, scores, 1) != FXQ_OK) stop("classify", fxq_last_error());
    const double first = milliseconds();
    if (fxq_run(model, input, 1, scores, 1) != FXQ_OK) stop("classify", fxq_last_error());
    fprintf(stderr, "%s: opened in %.1f ms, picture prepared in %.1f ms, first result after %.1f ms, second after %.1f ms\n",
            fxq_model_name(model), opened - start, prepared - opened, first - prepared, milliseconds() - first);

    const int64_t classes = fxq_output_elements(model, 0);
    int64_t wanted = count > 3 ? atoi(arguments[3]) : 5;
    for (wanted = wanted < classes ? wanted : classes; wanted > 0; --wanted) {
        int64_t best = 0;
        for (int64_t i = 1; i < classes; ++i)
            if (!(scores[0][i] <= scores[0][best])) best = i;
        printf("%lld %.9g\n", (long long)best, scores[0][best]);
        scores[0][best] = -INFINITY;
    }
    for (int i = 0; i < outputs; ++i) free(scores[i]);
    free(scores);
    free(input);
    fxq_close(model);
    return 0;
}
