"""P4: seconds an image of a regressor against CLIP Interrogator's fast mode, in one run.

True architectures with random weights: CLIP ViT-L/14 with all five lists and BLIP large at 384 px, whose captions have
twelve tokens (those of random weights would never end), against regressors upon ViT-B/16 and ViT-L/14 at 224 px. The
features of the lists are drawn, too: embedding them is done once, and kept. Seven 512 px drawings, in one batch.

    python benchmarks/interrogator.py [ROUNDS] [PRECISION]
"""

import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from record import record
from rounds import paired, ratio
from safetensors.torch import save_file
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

from img2prompt.build import build
from img2prompt.cache import cache_folder
from img2prompt.data.drawings import Drawings
from img2prompt.encoders.encoder import Encoder
from img2prompt.predictors import interrogator
from img2prompt.predictors.predictor import Predictor, Setting
from img2prompt.predictors.trained import load, pick_device
from img2prompt.regressor import Target, build_regressor
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.pairs import write_pairs

CAPTION_TOKENS = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OURS = ("ViT-B-16", "ViT-L-14")


def blip_large(folder: Path) -> Path:
    """BLIP large at its true size, with words of one letter in the place of the published vocabulary."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = BlipConfig(
        vision_config={**vision, "image_size": 384, "patch_size": 16},
        text_config={"vocab_size": 30524, "encoder_hidden_size": 1024, "bos_token_id": 30522, "sep_token_id": 102},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BlipImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


def fast_mode(folder: Path, setting: Setting) -> Predictor:
    """Our own CLIP Interrogator, its chain as published, with drawn features of the lists."""
    interrogator._CAPTION_TOKENS = CAPTION_TOKENS
    interrogator.text_features = lambda tower, name, texts, *rest: torch.randn(len(texts), 768)
    save_file(open_clip.create_model("ViT-L-14", force_quick_gelu=True).state_dict(), folder / "clip.safetensors")
    lists = dict.fromkeys(interrogator.LISTS, True)
    return interrogator.predictor(
        setting,
        name="clip_interrogator",
        mode="fast",
        model="ViT-L-14",
        tag="openai",
        pretrained=str(folder / "clip.safetensors"),
        captioner=str(blip_large(folder / "blip")),
        most_phrases=32,
        vision_config={},
        **lists,
    )


def regressor(folder: Path, model: str, setting: Setting) -> Predictor:
    encoder = {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": model, "tag": "openai"}
    built = build_regressor(
        build(encoder, Encoder), {"_target_": "img2prompt.heads.Linear"}, Target("random", None, 384)
    )
    built.save(folder / f"{model}.safetensors")
    return load(folder / f"{model}.safetensors", setting.device, setting.precision)


def main(rounds: int = 5, precision: str = "fp32") -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setting = Setting(pick_device("auto"), precision, None, cache_folder(str(folder / "cache")), 0, 0, [])
        predictors = {model: regressor(folder, model, setting) for model in OURS}
        predictors["CLIP Interrogator fast"] = fast_mode(folder, setting)
        write_pairs(Drawings(7, 1, 0, Procedural(512)).find().samples, folder)
        images = folder / "images"

        def seconds(predictor: Predictor) -> float:
            began = time.perf_counter()
            count = len(predictor.predict(images, batch_size=7, threads=2))
            return (time.perf_counter() - began) / count

        times = paired({name: lambda one=one: seconds(one) for name, one in predictors.items()}, rounds)
    theirs = times["CLIP Interrogator fast"]
    rows: list[dict[str, object]] = []
    for name, own in times.items():
        rows.append(
            {
                "claim": "P4 against CLIP Interrogator fast",
                "what": name,
                "precision": precision,
                "median_seconds_per_image": f"{sorted(own)[len(own) // 2]:.4f}",
                # How many times as fast.
                **ratio(theirs, own),
            }
        )
    record(f"interrogator_{precision}", rows)


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:2]), *sys.argv[2:3])
