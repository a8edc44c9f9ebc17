"""S1 and S2: making pairs with Stable Diffusion 2.0's architecture and random weights, through the store.

S1: what part of the matrix-multiplication rate, taken in the same command, 768 px in 50 steps use (goal 45 % on one
H200; on a CPU a small model in its place). S2: against `pipe(prompt)` in a loop that saves a PNG each (goal 2.0x); and
what the writing costs, as the share by which a run with it is slower than one that throws the pictures away (goal 1 %).

    python benchmarks/synthesis.py [images] [batch] [rounds]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from matmul import DEVICE, matmul_rate
from record import record
from rounds import paired, ratio
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from img2prompt.synthesis.pairs import Wanted
from img2prompt.synthesis.produce import produce, work_of
from img2prompt.synthesis.stable_diffusion import StableDiffusion
from img2prompt.synthesis.store import PictureStore

ON_GPU = DEVICE == "cuda"
SIZE_PX = 768 if ON_GPU else 128
STEPS = 50 if ON_GPU else 4
DTYPE = "bf16" if ON_GPU else "fp32"


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    lines = ",".join(
        f"{word!r}: {number}".replace("'", '"') for number, word in enumerate(words) if word[0] not in "'\"\\"
    )
    (folder / "vocab.json").write_text("{" + lines + "}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def pipeline_in(folder: Path) -> Path:
    """Stable Diffusion 2.0 as published, but for its weights and words; on a CPU with a quarter of its channels."""
    torch.manual_seed(0)
    part = 1 if ON_GPU else 4
    words = tokenizer_in(folder)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024 // part,
        intermediate_size=4096 // part,
        num_hidden_layers=23 // part,
        num_attention_heads=16 // part,
        hidden_act="gelu",
        projection_dim=512 // part,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=96,
        block_out_channels=tuple(one // part for one in (320, 640, 1280, 1280)),
        attention_head_dim=tuple(max(1, one // part) for one in (5, 10, 20, 20)),
        cross_attention_dim=1024 // part,
        norm_num_groups=32 // (1 if ON_GPU else 2),
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=tuple(one // part for one in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def flops_of(pipeline: diffusers.StableDiffusionPipeline) -> float:
    """Of one image: two passes of the U-Net a step, and one of the decoder."""
    side, width = SIZE_PX // 8, pipeline.unet.config.cross_attention_dim
    like = next(pipeline.unet.parameters())
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as unet:
            pipeline.unet(like.new_zeros(2, 4, side, side), 1, encoder_hidden_states=like.new_zeros(2, 77, width))
        with FlopCounterMode(display=False) as vae:
            pipeline.vae.decode(like.new_zeros(1, 4, side, side))
    return STEPS * unet.get_total_flops() + vae.get_total_flops()


class Forgetful(PictureStore):
    """Throws its pictures away."""

    def encode(self, picture):
        return b""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64 if ON_GPU else 8
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 16 if ON_GPU else 4
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    wanted = Wanted([f"a drawing of number {number}" for number in range(count)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = str(pipeline_in(folder))
        generator = StableDiffusion(
            model,
            preset="host_exact",
            steps=STEPS,
            size_px=SIZE_PX,
            saved_px=SIZE_PX * 2 // 3,
            device=DEVICE,
            dtype=DTYPE,
        )
        plain = diffusers.StableDiffusionPipeline.from_pretrained(model)
        plain.set_progress_bar_config(disable=True)
        plain.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)

        def stored(kind=PictureStore) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                store = kind(Path(out), generator.settings, {}, count, "webp", generator.saved_px, 4)
                store.claim(wanted)
                work = work_of(store, wanted, range(1))
                began = time.perf_counter()
                produce(work, generator, store, batch, lambda done: None)
                return count / (time.perf_counter() - began)

        def loop() -> float:
            few = wanted.pairs(0, max(2, count // 8))
            with tempfile.TemporaryDirectory(dir=folder) as out:
                began = time.perf_counter()
                for number, pair in enumerate(few):
                    dice = torch.Generator().manual_seed(pair.seed)
                    options = {"num_inference_steps": STEPS, "guidance_scale": 9.0, "generator": dice}
                    plain(pair.prompt, height=SIZE_PX, width=SIZE_PX, **options).images[0].save(f"{out}/{number}.png")
                return len(few) / (time.perf_counter() - began)

        speeds = paired({"ours": stored, "forgetful": lambda: stored(Forgetful), "pipe_loop": loop}, rounds)
        with generator._loaded(False) as pipeline:
            flops = flops_of(pipeline)
        peak = matmul_rate(torch.bfloat16 if ON_GPU else torch.float32)
    speed = statistics.median(speeds["ours"])
    cost = statistics.median(1 - one / other for one, other in zip(speeds["ours"], speeds["forgetful"], strict=True))
    row = {
        "model": "Stable Diffusion 2.0" if ON_GPU else "a quarter of its channels",
        "size_px": SIZE_PX,
        "steps": STEPS,
        "batch": batch,
        "tflop_per_image": f"{flops / 1e12:.3f}",
        "matmul_tflop_per_second": f"{peak / 1e12:.2f}",
        **{f"{way}_images_per_second": f"{statistics.median(found):.3f}" for way, found in speeds.items()},
        "utilisation": f"{flops * speed / peak:.3f}",
        "writer_cost": f"{cost:.4f}",
        **ratio(speeds["ours"], speeds["pipe_loop"]),
    }
    record("synthesis", [row])


if __name__ == "__main__":
    main()
