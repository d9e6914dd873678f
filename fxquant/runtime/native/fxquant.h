/* libfxquant: a quantized model from a file, run by integer kernels. No Python, no torch.

       FxqModel *model;
       if (fxq_open("model.fxm", &model) != FXQ_OK) { puts(fxq_last_error()); exit(1); }
       float *scores = malloc(fxq_output_elements(model, 0) * sizeof(float));
       fxq_run(model, image, 1, &scores, 1);
       fxq_close(model);

   `fxquant export model.fxq model.fxm` writes such files. They are little-endian, and so must the processor be. A file is
   checked as a whole when it is opened, so that a damaged or malicious one is refused and never makes the library read or
   write where it must not; it can still ask for much time and memory. While it is open, the file must not be changed in
   place: replace it by another file of the same name.

   Every function that can fail returns an FxqStatus, and `fxq_last_error` then says more. A model may be used by one thread
   at a time; several models, also of one file, by as many threads as there are models. This is C and C++. */
#ifndef FXQUANT_H
#define FXQUANT_H

#include <stdint.h>

#if defined(__cplusplus)
#define FXQ_C extern "C"
#else
#define FXQ_C extern
#endif
#if defined(_WIN32)
#define FXQ_PUBLIC FXQ_C __declspec(dllexport)
#else
#define FXQ_PUBLIC FXQ_C __attribute__((visibility("default")))
#endif

enum FxqStatus {
    FXQ_OK = 0,
    FXQ_NULL = 1,        /* a pointer is missing */
    FXQ_SIZE = 2,        /* a size is negative, zero, too large, or buffers do not have the lengths that sizes imply */
    FXQ_WIDTH = 3,       /* bits outside 2..8 */
    FXQ_QUANTIZER = 4,   /* a quantizer or its levels are malformed */
    FXQ_LAYOUT = 5,      /* a layout is damaged or of another kind or version */
    FXQ_MEMORY = 6,      /* no memory */
    FXQ_UNSUPPORTED = 7, /* this CPU does not have the instruction set that was asked for */
    FXQ_FILE = 8,        /* the file cannot be read */
    FXQ_PROGRAM = 9      /* what was opened is no model, is damaged, or is of another version */
};

enum FxqInterpolation { FXQ_NEAREST = 0, FXQ_BILINEAR = 1, FXQ_BICUBIC = 2 };
enum { FXQ_MAX_RANK = 8 };

/* How a picture becomes the model's input: its short side is resized to `resize`, with an antialiasing filter of that kind,
   the middle is cut out in the size of the input, and pixels in 0..1 become (pixel - mean) / std, channel by channel. */
struct FxqPreprocessing {
    int32_t known;         /* 1, for images of 1 or 3 channels; or 0 where the file does not say: then all else is 0 */
    int32_t interpolation; /* FxqInterpolation */
    int32_t resize[2];     /* pixels, down and across, 1 to 65536; they differ where the input is no square */
    float mean[3], std[3]; /* of red, green and blue; of one channel the first alone. No std is 0 */
};

typedef struct FxqModel FxqModel;

/* Opens a file. It is mapped, not read: processes that open the same file share its memory. *model is null after a failure. */
FXQ_PUBLIC int32_t fxq_open(const char *path, FxqModel **model);

/* The same for a file's content, at an address that is a multiple of 64. It must stay there until the model is closed. */
FXQ_PUBLIC int32_t fxq_open_memory(const void *content, int64_t bytes, FxqModel **model);

/* Frees everything; null is fine. */
FXQ_PUBLIC void fxq_close(FxqModel *model);

/* What a status means. */
FXQ_PUBLIC const char *fxq_message(int32_t status);

/* What went wrong last in this thread, and where, in one line; "" before anything has. Valid until this thread's next call. */
FXQ_PUBLIC const char *fxq_last_error(void);

/* The model's name, valid until it is closed. */
FXQ_PUBLIC const char *fxq_model_name(const FxqModel *model);

/* shape: channels, height and width of an image. */
FXQ_PUBLIC void fxq_image_shape(const FxqModel *model, int64_t shape[3]);

FXQ_PUBLIC const struct FxqPreprocessing *fxq_preprocessing(const FxqModel *model);

/* What the model returns: so many float32 tensors, each with a name ("scores" where there is one alone; for a tree of
   tensors keys and positions, such as "hidden_states.0"), numbers of one image, and the shape of these. An index outside
   gives "", 0 and rank 0. */
FXQ_PUBLIC int32_t fxq_output_count(const FxqModel *model);
FXQ_PUBLIC const char *fxq_output_name(const FxqModel *model, int32_t output);
FXQ_PUBLIC int64_t fxq_output_elements(const FxqModel *model, int32_t output);
FXQ_PUBLIC int32_t fxq_output_shape(const FxqModel *model, int32_t output, int64_t shape[FXQ_MAX_RANK]);

/* Runs the model. images: float32 (count, channels, height, width), preprocessed. outputs: for each of the model's, where
   count times its elements are written. threads: 1 or more, of which the caller's is one; the result is the same for any
   number. An image with a pixel that is NaN or infinite has NaN in all its outputs, the others are as without it. */
FXQ_PUBLIC int32_t fxq_run(FxqModel *model, const float *images, int64_t count, float *const *outputs, int32_t threads);

#endif
