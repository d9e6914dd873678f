"""One call: quantize a model within a budget, look at what came out, keep it, load it again.

    python examples/one_call.py

Writes model.fxq and bits.svg into the current folder.
"""

import torch

import fxquant
from fxquant.data import embedded
from fxquant.data.images import embedded_test
from fxquant.measure.accuracy import evaluate

model = embedded.load_model()  # any timm Vision Transformer
images = embedded.calibration_images(32)  # preprocessed as the model wants them; no labels

quantized = fxquant.compile(model, "W4A4", calibration=images)
print(quantized.report().brief())

quantized.save("model.fxq")
quantized.draw("bits.svg")
loaded = fxquant.load("model.fxq")
with torch.inference_mode():
    print("loaded gives the same outputs:", torch.equal(loaded(images), quantized(images)))

data = embedded_test()
print("float32  ", evaluate(model, data, limit=500))
print("quantized", evaluate(loaded, data, limit=500))
