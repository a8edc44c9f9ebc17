"""How an exported folder is used, in the words of the tools that open it: what its model card shows, and tests run."""

from typing import Any

from img2prompt.predictors.exported import OWN_TRANSFORM
from img2prompt.provenance import HUB, Provenance

# What every tool must do with a file before: turn it as its camera says, and put white under what can be seen through.
_OPENED = """\
def opened(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


"""

_SENTENCE_TRANSFORMERS = """\
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer


{opened}model = SentenceTransformer("{here}")
image = model.encode(opened("picture.png"))  # [{dimension}], unit length
texts = model.encode(["a red star on a night sky", "a bowl of soup"])
print(model.similarity(image, texts))
"""

_TIMM = """\
import timm
import torch
from PIL import Image, ImageOps
{imports}

{opened}model = timm.create_model("{timm_here}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
{transform}
with torch.inference_mode():
    image = model(transform(opened("picture.png"))[None])
image = torch.nn.functional.normalize(image)[0]  # [{dimension}]
"""

_TIMM_TRANSFORM = "transform = timm.data.create_transform(**data, is_training=False)"
_TIMM_IMPORTS = "from torchvision.transforms import Compose, Normalize, ToTensor\n"
_TIMM_OWN = """\


def fitted(image):  # create_transform {difference}
{fit}


transform = Compose([fitted, ToTensor(), Normalize(data["mean"], data["std"])])"""

_ONNX = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


{opened}def fitted(image):
{fit}


session = onnxruntime.InferenceSession("{here}/model.onnx")
pixels = np.asarray(fitted(opened("picture.png")))
images = pixels.transpose(2, 0, 1)[None]  # uint8 [B, 3, {size}, {size}]; normalisation is inside
image = session.run(None, {{"images": images}})[0][0]  # [{dimension}], unit length
"""

_FITS = {
    "shortest": """\
    scale = {size} / min(image.size)
    width, height = (max({size}, int(side * scale)) for side in image.size)
    left, top = (width - {size}) // 2, (height - {size}) // 2
    image = image.resize((width, height), Image.Resampling.{filter})
    return image.crop((left, top, left + {size}, top + {size}))""",
    "longest": """\
    width, height = (max(1, round(side * {size} / max(image.size))) for side in image.size)
    square = Image.new("RGB", ({size}, {size}), "white")
    image = image.resize((width, height), Image.Resampling.{filter})
    square.paste(image, (({size} - width) // 2, ({size} - height) // 2))
    return square""",
    "squash": """\
    return image.resize(({size}, {size}), Image.Resampling.{filter})""",
}

_OURS = """\
import img2prompt

model = img2prompt.load("{here}")
found = model.predict("picture.png")  # a file, a folder, a glob, or a list of these
image = found.embeddings[0]  # [{dimension}], unit length
"""

_INDEX = """\
import numpy as np
from sentence_transformers import SentenceTransformer

prompts = ["a red star on a night sky", "a bowl of soup", "a portrait of a cat"]
index = SentenceTransformer({text_model}).encode(prompts, normalize_embeddings=True)
cosines = index @ np.asarray(image).reshape(-1)
print(prompts[int(cosines.argmax())])
"""

# What each library calls a repository of the Hub; onnxruntime knows only files.
_HERE = {"sentence_transformers": "{}", "onnx": "."}

_COMMAND = """\
python predict.py ckpt={place} images=pictures/ out=predictions.parquet
"""


def snippets(about: Provenance, repository: str | None = None) -> list[tuple[str, str, str]]:
    """Title, language and code of each way to use an export that lies in a `repository` of the Hub or, without one, in
    the working folder; the second goes on with the embedding that the first has.
    """
    wanted = about.preprocessing
    dimension = about.header.target.dimension
    found: dict[str, tuple[str, str]] = {
        "sentence_transformers": ("sentence-transformers", _SENTENCE_TRANSFORMERS),
        "timm": ("timm", _TIMM),
        "onnx": ("onnxruntime", _ONNX),
    }
    title, code = found.get(about.format, ("img2prompt, in Python", _OURS))
    fit = _FITS[wanted.resize_mode].format(size=wanted.image_size_px, filter=wanted.interpolation.upper())
    difference = about.options.get(OWN_TRANSFORM)
    values: dict[str, Any] = {
        "here": _HERE.get(about.format, HUB + "{}").format(repository) if repository else ".",
        "dimension": dimension,
        "opened": _OPENED,
        "size": wanted.image_size_px,
        "imports": _TIMM_IMPORTS if difference else "",
        "transform": _TIMM_OWN.format(fit=fit, difference=difference) if difference else _TIMM_TRANSFORM,
        "fit": fit,
        "text_model": _quoted(about.header.target.model),
        "timm_here": f"hf-hub:{repository}" if repository else "local-dir:.",
        "place": f"{HUB}{repository}" if repository else "FOLDER",
    }
    return [
        (title, "python", code.format(**values)),
        ("A text index becomes searchable by image", "python", _INDEX.format(**values)),
        ("img2prompt, on the command line", "sh", _COMMAND.format(**values)),
    ]


def _quoted(name: str) -> str:
    """A name for code inside a fence, which a stranger's checkpoint must not leave."""
    return repr(" ".join(name.replace("`", "").split())).replace("'", '"') if '"' not in name else '""'
