"""Architectures of transformers by name, in any size: what is tested with small random weights, and timed with larger ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Kind = Literal["decoder", "encoder", "vision", "two towers", "encoder-decoder"]


@dataclass(frozen=True)
class Size:
    """How large a model is. Encoders have ``encoder_heads``; ``spread`` is the deviation of random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    encoder_heads: int
    head_dim: int
    mlp: int
    vocab: int
    positions: int
    window: int
    image: int
    patch: int
    spread: float = 0.02


# For tests: all kinds of layers, and a window that is soon left behind.
TINY = Size(
    hidden=64, layers=4, heads=8, kv_heads=2, encoder_heads=4, head_dim=16, mlp=96, vocab=211, positions=128, window=6,
    image=40, patch=8, spread=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model class with its configuration. ``calls``: attention calls of one forward."""

    kind: Kind
    model: str
    config: str
    calls: int
    settings: dict[str, Any] = field(hash=False)
    sdpa: bool = True  # False: transformers computes its softcap or its sinks in eager alone

    def make(self, implementation: str, seed: int = 0) -> Any:
        """The model with random weights, in evaluation mode: without dropout."""
        import torch

        transformers: Any = import_module("transformers")
        import_module("attnkit.integrations.transformers")  # registers "attnkit"
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        model = getattr(transformers, self.model)._from_config(config, attn_implementation=implementation)
        if self.model == "GptOssForCausalLM":  # its sinks and biases are allocated and not set
            for weight in model.parameters():
                if weight.dim() == 1:
                    torch.nn.init.normal_(weight, 0, 0.5)
        return model.eval()


def architectures(size: Size) -> dict[str, Architecture]:
    """All of them in one size."""
    s = size
    width: dict[str, Any] = {
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "intermediate_size": s.mlp,
        "initializer_range": s.spread,
    }
    encoder = {
        "vocab_size": s.vocab, "num_attention_heads": s.encoder_heads, "max_position_embeddings": s.positions,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **width,
    }  # fmt: skip
    decoder = {**encoder, "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads}
    windowed = {**decoder, "sliding_window": s.window}
    wide = {"head_dim": s.head_dim}
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2}
    vision = {"num_attention_heads": s.encoder_heads, "image_size": s.image, "patch_size": s.patch, **width}
    pair = {
        "vocab_size": s.vocab,
        "d_model": s.hidden,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(s.layers)]

    def lm(
        name: str, settings: dict[str, Any], *, config: str | None = None, sdpa: bool = True
    ) -> Architecture:
        return Architecture(
            "decoder", f"{name}ForCausalLM", config or f"{name}Config", s.layers, settings, sdpa
        )

    def mlm(name: str, settings: dict[str, Any]) -> Architecture:
        return Architecture("encoder", f"{name}ForMaskedLM", f"{name}Config", s.layers, settings)

    return {
        "llama": lm("Llama", decoder),
        "mistral": lm("Mistral", windowed),
        "gemma2": lm("Gemma2", {**windowed, **wide, "attn_logit_softcapping": 5.0, "tie_word_embeddings": False}, sdpa=False),
        "gemma3": lm("Gemma3", {**windowed, **wide, "layer_types": alternating, "tie_word_embeddings": False}, config="Gemma3TextConfig"),
        "gpt_oss": lm("GptOss", {**windowed, **mixture, **wide}, sdpa=False),
        "qwen2": lm("Qwen2", {**windowed, "use_sliding_window": True, "max_window_layers": s.layers // 2}),
        "qwen3": lm("Qwen3", {**decoder, **wide}),
        "phi": lm("Phi", decoder),
        "phi3": lm("Phi3", windowed),
        "mixtral": lm("Mixtral", {**decoder, **mixture, "sliding_window": None}),
        "llama4": lm(  # attends within chunks of the sequence
            "Llama4",
            {**decoder, **wide, "attention_chunk_size": s.window, "num_local_experts": 2, "intermediate_size_mlp": s.mlp,
             "no_rope_layers": [int(i + 1 < s.layers) for i in range(s.layers)]},
            config="Llama4TextConfig",
        ),
        "deepseek_v3": lm(  # heads of another width for values
            "DeepseekV3",
            {**decoder, "num_key_value_heads": s.heads, "q_lora_rank": s.hidden // 4, "kv_lora_rank": s.hidden // 4,
             "qk_rope_head_dim": s.head_dim // 2, "qk_nope_head_dim": s.head_dim // 2, "v_head_dim": s.head_dim * 3 // 2,
             "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
             "moe_intermediate_size": s.mlp // 3},
        ),
        "gpt2": Architecture(
            "decoder", "GPT2LMHeadModel", "GPT2Config", s.layers,
            {"vocab_size": s.vocab, "n_embd": s.hidden, "n_layer": s.layers, "n_head": s.encoder_heads,
             "n_positions": s.positions, "initializer_range": s.spread, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "bert": mlm("Bert", encoder),
        "roberta": mlm("Roberta", encoder),
        "modernbert": mlm(
            "ModernBert",
            {**encoder, "local_attention": s.window, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        ),
        "vit": Architecture("vision", "ViTForImageClassification", "ViTConfig", s.layers, {**vision, "num_labels": 17}),
        "clip": Architecture(
            "two towers", "CLIPModel", "CLIPConfig", 2 * s.layers, {"text_config": encoder, "vision_config": vision}
        ),
        "t5": Architecture(  # encoder, decoder, and from one to the other; a bias of relative positions
            "encoder-decoder", "T5ForConditionalGeneration", "T5Config", 3 * s.layers,
            {**pair, "d_kv": s.head_dim, "d_ff": s.mlp, "num_layers": s.layers, "num_heads": s.encoder_heads},
        ),
        "bart": Architecture(
            "encoder-decoder", "BartForConditionalGeneration", "BartConfig", 3 * s.layers,
            {**pair, "encoder_layers": s.layers, "decoder_layers": s.layers, "encoder_attention_heads": s.encoder_heads,
             "init_std": s.spread, "decoder_attention_heads": s.encoder_heads, "encoder_ffn_dim": s.mlp,
             "decoder_ffn_dim": s.mlp, "max_position_embeddings": s.positions},
        ),
    }  # fmt: skip
