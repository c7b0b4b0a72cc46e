"""Small models of transformers from random configs, with what to call them on. Nothing is downloaded.

Sizes tell axes apart: hidden 48, 4 heads of 12, FFN 96 and so on, grouped queries where the model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

VOCABULARY = 90
LAYERS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens(length: int = 9, batch: int = 2) -> Tensor:
    """Return int64 `[batch, length]` token ids without special ones, the same at every call."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def images(side: int = 32) -> Tensor:
    """Return float `[2, 3, side, side]`."""
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))


def drawn(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, with biases and scales that are no longer constant: 0 and 1 hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    return model.eval()


def _text(model: type[nn.Module], config: Callable[..., Any], **sizes: Any) -> Example:
    return drawn(model(config(**{**TEXT, **SPECIAL, **sizes}))), (), {"input_ids": tokens()}


def _image(model: type[nn.Module], config: Callable[..., Any], side: int = 32, **sizes: Any) -> Example:
    return drawn(model(config(num_labels=7, **sizes))), (), {"pixel_values": images(side)}


def bert() -> Example:
    """Classifier; absolute positions, post-norm."""
    return _text(transformers.BertForSequenceClassification, transformers.BertConfig, num_labels=7)


def bert_lm() -> Example:
    """Masked language model, its head tied to the embedding."""
    return _text(transformers.BertForMaskedLM, transformers.BertConfig)


def distilbert() -> Example:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=40, dim=48, n_layers=2, n_heads=4, hidden_dim=96, num_labels=7
    )
    return drawn(transformers.DistilBertForSequenceClassification(config)), (), {"input_ids": tokens()}


def roberta() -> Example:
    return _text(transformers.RobertaForSequenceClassification, transformers.RobertaConfig, num_labels=7)


def gpt2() -> Example:
    """Fused query, key and value in a layer of its own; the head is tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=48, n_layer=2, n_head=4, n_inner=96, **SPECIAL
    )
    return drawn(transformers.GPT2LMHeadModel(config)), (), {"input_ids": tokens()}


def llama() -> Example:
    """Two queries for each key, rotary positions, gated FFN."""
    return _text(transformers.LlamaForCausalLM, transformers.LlamaConfig, num_key_value_heads=2)


def qwen2() -> Example:
    """As Llama, with biases on query, key and value, and a tied head."""
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return _text(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, **sizes)


def mistral() -> Example:
    """As Llama, with a sliding window."""
    sizes = {"num_key_value_heads": 2, "sliding_window": 6}
    return _text(transformers.MistralForCausalLM, transformers.MistralConfig, **sizes)


def t5() -> Example:
    """Encoder and decoder; inner width of attention apart from the hidden one, tied tables, relative positions."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=10,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=2,
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(5)}
    return drawn(transformers.T5ForConditionalGeneration(config)), (), inputs


def vit() -> Example:
    return _image(transformers.ViTForImageClassification, transformers.ViTConfig, **IMAGE)


def swin() -> Example:
    """Two stages of windows, the second of four windows that shift."""
    return _image(
        transformers.SwinForImageClassification,
        transformers.SwinConfig,
        image_size=32,
        patch_size=2,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    )


def segformer() -> Example:
    """Four stages of attention over shrunk keys, and a decoder over all of them."""
    return _image(
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig,
        side=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 4, 4],
        mlp_ratios=[4, 4, 4, 4],
        sr_ratios=[4, 2, 2, 1],
        decoder_hidden_size=36,
    )


def convnext() -> Example:
    return _image(
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig,
        side=64,
        depths=[1, 2, 1, 1],
        hidden_sizes=[12, 20, 28, 36],
    )


def resnet() -> Example:
    return _image(
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig,
        side=64,
        embedding_size=12,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 2, 1, 1],
    )


def clip() -> Example:
    """Two towers of different widths that meet in a product."""
    text = {**TEXT, **SPECIAL, "projection_dim": 28}
    vision = {**IMAGE, "hidden_size": 40, "intermediate_size": 80}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=28)
    return drawn(transformers.CLIPModel(config)), (), {"input_ids": tokens(), "pixel_values": images()}


def whisper() -> Example:
    """Sound to text; the head is tied to the decoder's embedding."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=14,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=84,
        max_source_positions=20,
        max_target_positions=30,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **SPECIAL,
    )
    sound = torch.randn(2, 14, 40, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": sound, "decoder_input_ids": tokens(5)}
    return drawn(transformers.WhisperForConditionalGeneration(config)), (), inputs


def wav2vec2() -> Example:
    """Convolutions over the waveform, grouped convolution with weight norm for positions."""
    config = transformers.Wav2Vec2Config(
        **LAYERS,
        vocab_size=VOCABULARY,
        conv_dim=(20, 20, 28),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    sound = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    return drawn(transformers.Wav2Vec2ForCTC(config)), (), {"input_values": sound}


HF_MODELS: dict[str, Callable[[], Example]] = {
    "bert": bert,
    "bert_lm": bert_lm,
    "distilbert": distilbert,
    "roberta": roberta,
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "mistral": mistral,
    "t5": t5,
    "vit": vit,
    "swin": swin,
    "segformer": segformer,
    "convnext": convnext,
    "resnet": resnet,
    "clip": clip,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
}
"""Name -> what makes a model in eval mode, and the positional and keyword arguments of its forward."""
