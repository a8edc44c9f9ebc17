"""A random Stable Diffusion of the real classes, small enough for a CPU."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 32


def tokenizer_in(folder: Path) -> CLIPTokenizer:
    """Of CLIP's kind, with the characters of ASCII for its words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def tiny_stable_diffusion_1(folder: Path) -> Path:
    """A pipeline folder as Stable Diffusion 1 has it."""
    return tiny_stable_diffusion(folder, "epsilon", is_version_1=True)


def tiny_stable_diffusion(
    folder: Path, prediction_type: str = "v_prediction", size_px: int = 32, is_version_1: bool = False
) -> Path:
    """A pipeline folder as Stable Diffusion 2 has it, whose pictures are noise of `size_px`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=size_px // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=not is_version_1,
    )
    tokenizer = tokenizer_in(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def tiny_stable_diffusion_xl(folder: Path) -> Path:
    """A pipeline folder of another class: two text encoders, and the size of the picture as a condition."""
    torch.manual_seed(0)
    tokenizer = tokenizer_in(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        cross_attention_dim=2 * WIDTH,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def tiny_clip(folder: Path, pipeline: Path, width: int = 24, projected: int = WIDTH) -> Path:
    """A CLIP of random weights, whose texts are those that a pipeline of `tiny_stable_diffusion_1` reads."""
    torch.manual_seed(2)
    text = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    vision = {"hidden_size": width, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPModel(
        CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config={**vision, "image_size": 32, "patch_size": 8},
            projection_dim=projected,
        )
    )
    clip.text_model.load_state_dict(text.state_dict())
    # Of about the size that published ones have: above the floor, but for some.
    torch.nn.init.normal_(clip.text_projection.weight, std=0.2)
    clip.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer").save_pretrained(folder)
    return folder


def tiny_captioner(folder: Path) -> Path:
    """A random BLIP that says letters and few words, and of most noises something else."""
    torch.manual_seed(1)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "cat", "dog", "of", "##s", "sea", "sky"]
    text = {
        "vocab_size": len(words),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 32,
        "initializer_range": 1.0,
    }
    ends = {"bos_token_id": 5, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": 16, "patch_size": 4, "initializer_range": 1.0, **small}
    BlipForConditionalGeneration(
        BlipConfig(text_config={**small, **text, **ends}, vision_config=vision, initializer_range=1.0)
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
    )
