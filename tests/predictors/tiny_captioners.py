"""Random captioners of the real classes, small enough for a CPU, in folders as they are published."""

from pathlib import Path

import torch
from tiny_diffusion import tiny_captioner
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "a", "red", "cat", "dog", "of", "##s", "sea", "sky"]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# The usual ones would make every word as likely as any other.
LOUD = {"initializer_range": 1.0}
VISION = {**SMALL, **LOUD, "image_size": 16, "patch_size": 4}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def words_in(folder: Path, **more) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    words = BertTokenizer(str(folder / "vocab.txt"), **more)
    words.save_pretrained(folder)
    return words


def blip(folder: Path) -> Path:
    return tiny_captioner(folder)


def git(folder: Path) -> Path:
    torch.manual_seed(3)
    config = GitConfig(vision_config=VISION, vocab_size=len(WORDS), max_position_embeddings=64, **SMALL, **LOUD, **ENDS)
    GitForCausalLM(config).save_pretrained(folder)
    words_in(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def blip_2(folder: Path) -> Path:
    torch.manual_seed(13)
    opt = {"vocab_size": len(WORDS), "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 1.0, "model_type": "opt", **ENDS}
    asking = {**SMALL, **LOUD, "encoder_hidden_size": 32, "vocab_size": len(WORDS), "max_position_embeddings": 16}
    config = Blip2Config(
        vision_config=VISION, qformer_config=asking, text_config=opt, num_query_tokens=3, image_token_index=5
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    words_in(folder, additional_special_tokens=["<image>"])
    BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def vit_gpt2(folder: Path) -> Path:
    torch.manual_seed(5)
    decoder = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=64, add_cross_attention=True, **LOUD, **ENDS
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = ENDS["bos_token_id"], ENDS["pad_token_id"]
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=2, **ENDS)
    model.save_pretrained(folder)
    words_in(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """It wants to be asked."""
    torch.manual_seed(6)
    text = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=128, **SMALL, **LOUD, **ENDS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=5,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    words = words_in(folder, additional_special_tokens=["<image>"])
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


FAMILIES = {"blip": blip, "git": git, "blip_2": blip_2, "vit_gpt2": vit_gpt2, "llava": llava}
