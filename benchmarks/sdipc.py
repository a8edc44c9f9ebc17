"""V1 and V2: what an image costs before it is varied, with the true architectures of Stable Diffusion 1.4 and CLIP
ViT-L/14 and random weights: seconds of conversion an image, and of SD-IPC-CT's 30 iterations. On a CPU the U-Net has a
quarter of its channels and the pictures are small; the conversion is that of the true CLIP.

    python benchmarks/sdipc.py [images]
"""

import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from matmul import DEVICE
from record import record
from synthesis import tokenizer_in
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from img2prompt.sdipc.converter import Converter
from img2prompt.sdipc.tuning import References, Tuning, tune

ON_GPU = DEVICE == "cuda"
SIZE_PX = 512 if ON_GPU else 64
WIDTH = 768


def converter_in(folder: Path) -> Converter:
    torch.manual_seed(0)
    part = 1 if ON_GPU else 4
    words = tokenizer_in(folder)
    text = {
        "vocab_size": 49408,
        "hidden_size": WIDTH,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    torch.nn.init.normal_(clip.text_projection.weight, std=0.1)
    encoder = CLIPTextModel(CLIPTextConfig(**text))
    encoder.load_state_dict(clip.text_model.state_dict())
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE_PX // 8,
        block_out_channels=tuple(one // part for one in (320, 640, 1280, 1280)),
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        norm_num_groups=32 // (1 if ON_GPU else 2),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=tuple(one // part for one in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Converter(clip.to(DEVICE), pipeline.to(DEVICE))


def seconds(work) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64 if ON_GPU else 4
    with tempfile.TemporaryDirectory() as temporary:
        converter = converter_in(Path(temporary))
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)

    def convert() -> None:
        with torch.inference_mode():
            converter.conditions(converter.convert(images))

    convert()
    conversion = min(seconds(convert) for _ in range(3)) / count
    latents = torch.randn(5, 4, SIZE_PX // 8, SIZE_PX // 8)
    how = Tuning("sdipc_ct", epochs=None, iterations=30, lr=5e-6, schedule="constant", batch_size=1, text_term=False)
    references = References(torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8), latents)
    tune(converter, references, Tuning(**{**vars(how), "iterations": 1}), 0)
    tuning = seconds(lambda: tune(converter, references, how, 0))
    record(
        "sdipc",
        [
            {
                "claim": "V1 conversion, V2 SD-IPC-CT in 30 iterations",
                "u_net": "Stable Diffusion 1.4" if ON_GPU else "a quarter of its channels",
                "size_px": SIZE_PX,
                "images": count,
                "conversion_seconds_per_image": f"{conversion:.4f}",
                "ct_30_iterations_seconds": f"{tuning:.1f}",
            }
        ],
    )


if __name__ == "__main__":
    main()
