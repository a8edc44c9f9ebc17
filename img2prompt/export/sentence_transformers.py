"""A folder that SentenceTransformer opens, without any code of ours: images and texts in one space.

An image goes through CLIP's vision transformer under transformers' name, the head as dense layers, and to unit length;
a text through the very encoder whose embeddings were learnt.
"""

import tempfile
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, DeepseekVLImageProcessor
from transformers.utils import logging as transformers_logging

from img2prompt.data.targets import TextModel
from img2prompt.encoders.encoder import Preprocessing, load_strictly
from img2prompt.export.clip_vit import ClipViT, clip_vit_of, with_white_mean
from img2prompt.export.folding import folded
from img2prompt.regressor import Regressor

_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_IMAGE = {"image": {"method": "forward", "method_output_name": "pooler_output"}}


def write_sentence_transformers(regressor: Regressor, text: TextModel, folder: Path) -> None:
    """Fills `folder`; `text` is the encoder of the texts. ValueError for an image encoder or a head that has no place
    in it, and where texts would be embedded in another space.
    """
    transformers_logging.disable_progress_bar()
    vit = clip_vit_of(regressor.encoder)
    layers = folded(regressor.head, vit.projection)
    wanted = regressor.encoder.preprocessing
    if wanted.resize_mode == "longest":
        vit = with_white_mean(vit, wanted)
    dense = [
        Dense(
            layer.weight.shape[1],
            layer.weight.shape[0],
            activation_function=nn.Identity() if layer.activation is None else layer.activation(),
            init_weight=layer.weight,
            init_bias=layer.bias,
        )
        for layer in layers
    ]
    texts: Any = SentenceTransformer(text.location, revision=text.revision if text.download else None, device="cpu")
    if texts.get_embedding_dimension() != regressor.target.dimension:
        raise ValueError(
            f"text_model={text.name}: embeddings of {texts.get_embedding_dimension()} numbers, the checkpoint predicts "
            f"{regressor.target.dimension}"
        )
    with tempfile.TemporaryDirectory(prefix="img2prompt-") as temporary:
        image = _image_module(vit, wanted, Path(temporary))
        router = Router({"text": list(texts), "image": [image, *dense, Normalize()]}, default_route="text")
        model = SentenceTransformer(
            modules=[router], device="cpu", prompts=texts.prompts, default_prompt_name=texts.default_prompt_name
        )
        model.save_pretrained(str(folder), create_model_card=False)


def processor(wanted: Preprocessing) -> Any:
    """transformers' image processor that does what the encoder wants."""
    size = wanted.image_size_px
    square = {"height": size, "width": size}
    shared: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _RESAMPLING[wanted.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }
    if wanted.resize_mode == "shortest":
        crop: dict[str, Any] = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
        return CLIPImageProcessor(**shared, **crop)
    if wanted.resize_mode == "squash":
        return CLIPImageProcessor(**shared, size=square, do_center_crop=False)
    # The one that fits the longer side and centres: its margin has the mean colour, see `with_white_mean`.
    white = {"image_mean": [1.0, 1.0, 1.0], "size": square, "min_size": 1, "do_pad": True}
    return DeepseekVLImageProcessor(**{**shared, **white})


def _image_module(vit: ClipViT, wanted: Preprocessing, temporary: Path) -> Transformer:
    model = CLIPVisionModel(CLIPVisionConfig(**{key: vit.config[key] for key in vit.config if key != "model_type"}))
    load_strictly(model, vit.weights, "the export")
    model.save_pretrained(temporary)
    processor(wanted).save_pretrained(temporary)
    return Transformer(str(temporary), modality_config=_IMAGE, module_output_name="sentence_embedding")
