"""Adapters of PEFT on a Llama whose own weights rest."""

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.unmodified.decoders import LLAMA
from benchmarks.unmodified.encoders import BERT
from benchmarks.unmodified.entry import Entry, classes, inside, logits, of, text

_LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
_TWO = {"target_modules": ["q_proj", "v_proj"]}
_SQUARE = {"target_modules": ["q_proj", "o_proj"]}


def _peft(name: str, config: str, cells: tuple[str, ...] | None = None, **settings: Any) -> Entry:
    def build() -> nn.Module:
        import peft

        base = of("transformers", "LlamaForCausalLM", "LlamaConfig", **LLAMA)()
        adapter = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
        made: nn.Module = peft.get_peft_model(base, adapter)
        return made

    return Entry(f"PEFT {name}", build, text, inside, logits, cells=cells)


def _checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import peft

        base = of("transformers", "LlamaForCausalLM", "LlamaConfig", **LLAMA)()
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        made: nn.Module = peft.get_peft_model(base, peft.LoraConfig("CAUSAL_LM", **_LORA))
        return made

    return build


def _classified() -> nn.Module:
    import peft

    base = of("transformers", "BertForSequenceClassification", "BertConfig", **BERT)()
    made: nn.Module = peft.get_peft_model(
        base, peft.LoraConfig("SEQ_CLS", r=4, lora_dropout=0.0, modules_to_save=["classifier"])
    )
    return made


def _two_adapters() -> nn.Module:
    import peft

    base = of("transformers", "LlamaForCausalLM", "LlamaConfig", **LLAMA)()
    made = peft.get_peft_model(base, peft.LoraConfig("CAUSAL_LM", **_LORA))
    made.add_adapter("other", peft.LoraConfig("CAUSAL_LM", **_LORA))
    made.set_adapter("other")
    assert isinstance(made, nn.Module)
    return made


ADAPTERS = [
    _peft("LoRA", "LoraConfig", **_LORA),
    _peft("DoRA", "LoraConfig", use_dora=True, **_LORA),
    _peft(
        "IA3",
        "IA3Config",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    # It draws whether a module is left out.
    _peft("LoHa", "LoHaConfig", ("base_model.model.model.layers.*",), r=4, alpha=8, **_TWO),
    _peft("VeRA", "VeraConfig", r=4, save_projection=False, target_modules=["q_proj"]),
    _peft("prompt tuning", "PromptTuningConfig", num_virtual_tokens=4),
    _peft("LoRA, every linear layer", "LoraConfig", **{**_LORA, "target_modules": "all-linear"}),
    _peft("LoRA, head trained", "LoraConfig", modules_to_save=["lm_head"], **_LORA),
    _peft("PiSSA", "LoraConfig", init_lora_weights="pissa", **_LORA),
    _peft("LoKr", "LoKrConfig", r=4, alpha=8, **_TWO),
    _peft("AdaLoRA", "AdaLoraConfig", total_step=100, init_r=4, target_r=2, **_TWO),
    _peft("OFT", "OFTConfig", oft_block_size=8, r=0, **_SQUARE),
    _peft("BOFT", "BOFTConfig", boft_block_size=8, **_SQUARE),
    _peft("HRA", "HRAConfig", r=4, **_SQUARE),
    _peft("FourierFT", "FourierFTConfig", n_frequency=16, **_TWO),
    _peft("LayerNorm tuning", "LNTuningConfig", target_modules=["input_layernorm"]),
    _peft("RandLoRA", "RandLoraConfig", r=4, save_projection=False, **_SQUARE),
    _peft("SHiRA", "ShiraConfig", r=4, **_TWO),
    _peft("C3A", "C3AConfig", block_size=8, **_SQUARE),
    _peft("VB-LoRA", "VBLoRAConfig", r=4, num_vectors=8, vector_length=8, **_SQUARE),
    _peft("trainable tokens", "TrainableTokensConfig", token_indices=[3, 4, 5]),
    _peft("prefix tuning", "PrefixTuningConfig", num_virtual_tokens=4),
    _peft("P-tuning", "PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
    _peft("adaption prompts", "AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
    Entry("PEFT LoRA on BERT, head trained", _classified, classes, inside, logits),
    Entry("PEFT two LoRA adapters", _two_adapters, text, inside, logits),
    Entry("PEFT LoRA, checkpointing", _checkpointed(False), text, inside, logits),
    Entry("PEFT LoRA, reentrant checkpointing", _checkpointed(True), text, inside, logits),
]
