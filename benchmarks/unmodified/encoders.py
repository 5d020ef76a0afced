"""Models of transformers that read a text and classify it, or fill gaps in it."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.unmodified.decoders import WIDTH
from benchmarks.unmodified.entry import Batch, Entry, classes, ids, inside, logits, mask, of, text

BERT = {
    **WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
}
_LONG = {**BERT, "max_position_embeddings": 70}
_XLM = {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
_MODERN = {
    **WIDTH,
    "num_labels": 3,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "classifier_dropout": 0.0,
}


def encoder(name: str, kind: str, settings: dict[str, Any] = BERT, **more: Any) -> Entry:
    """A classifier of texts, unless another `model` is named."""
    known = ("cells", "dtype", "other_length", "length_fixed")
    options = {key: more.pop(key) for key in known if key in more}
    batch = more.pop("batch", classes)
    model = more.pop("model", f"{kind}ForSequenceClassification")
    build = of("transformers", model, f"{kind}Config", **{**settings, **more})
    return Entry(name, build, batch, inside, logits, **options)


def _and(**others: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], Batch]:
    """A classifier's batch with more in it."""

    def batch(num_samples: int, length: int) -> Batch:
        more = {name: made(num_samples, length) for name, made in others.items()}
        return {**classes(num_samples, length), **more}

    return batch


def _boxes(num_samples: int, length: int) -> torch.Tensor:
    """Where the words stand on the page."""
    return torch.randint(0, 30, (num_samples, length, 2)).repeat(1, 1, 2)


def _answers(num_samples: int, length: int) -> Batch:
    """Where in the text the answer stands."""
    return {
        "input_ids": ids(num_samples, length),
        "attention_mask": mask(num_samples, length),
        "start_positions": torch.arange(num_samples) % 5,
        "end_positions": torch.arange(num_samples) % 5 + 3,
    }


def _starts(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.start_logits
    return found


ENCODERS = [
    encoder("BERT", "Bert"),
    encoder("RoBERTa", "Roberta", _LONG),
    encoder("ALBERT", "Albert", embedding_size=16, classifier_dropout_prob=0.0),
    encoder("ELECTRA", "Electra", embedding_size=16),
    encoder("MPNet", "MPNet", _LONG),
    encoder(
        "DistilBERT",
        "DistilBert",
        {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 100},
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    encoder("DeBERTa-v2", "DebertaV2", relative_attention=True, cells=("deberta.encoder.layer.*",)),
    encoder("ModernBERT", "ModernBert", {**_MODERN, "local_attention": 8}),
    encoder("BERT, masked tokens", "Bert", batch=text, model="BertForMaskedLM"),
    Entry(
        "BERT, answers",
        of("transformers", "BertForQuestionAnswering", "BertConfig", **{**BERT, "num_labels": 2}),
        _answers,
        inside,
        _starts,
    ),
    encoder("RoBERTa, pre-norm", "RobertaPreLayerNorm", _LONG),
    encoder("XLM-RoBERTa", "XLMRoberta", _LONG),
    encoder("DeBERTa", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder("ConvBERT", "ConvBert", embedding_size=32, conv_kernel_size=3, head_ratio=2),
    encoder("SqueezeBERT", "SqueezeBert", embedding_size=32),
    encoder("MobileBERT", "MobileBert", embedding_size=16, intra_bottleneck_size=16),
    encoder("FNet", "FNet", batch=lambda n, k: {**classes(n, k), "attention_mask": None}),
    encoder(
        "Funnel",
        "Funnel",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "vocab_size": 100},
        block_sizes=[1, 1],
        num_decoder_layers=1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_labels=3,
        length_fixed="it pools by the example's length",
    ),
    encoder("BigBird", "BigBird", attention_type="original_full"),
    encoder("Longformer", "Longformer", _LONG, attention_window=8),
    encoder(
        "Nystromformer",
        "Nystromformer",
        num_landmarks=24,
        segment_means_seq_len=24,
        other_length=24,
    ),
    encoder("YOSO", "Yoso", use_expectation=True),
    encoder("RoFormer", "RoFormer", embedding_size=32),
    encoder("ESM", "Esm", _LONG, position_embedding_type="rotary", mask_token_id=1),
    encoder("I-BERT", "IBert", _LONG),
    encoder("LayoutLM", "LayoutLM", batch=_and(bbox=_boxes), max_2d_position_embeddings=64),
    encoder(
        "XLM",
        "XLM",
        _XLM,
        summary_first_dropout=0.0,
        vocab_size=100,
        n_words=100,
        num_labels=3,
        **{"pad_index": 0},
    ),
    encoder(
        "XLNet",
        "XLNet",
        {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64},
        vocab_size=100,
        dropout=0.0,
        summary_last_dropout=0.0,
        num_labels=3,
        use_mems_train=False,
    ),
    encoder("NomicBERT", "NomicBert"),
    encoder(
        "CANINE",
        "Canine",
        local_transformer_stride=8,
        downsampling_rate=4,
        num_hash_buckets=64,
        length_fixed="it pads to whole strides",
        dtype=torch.float32,
    ),
    encoder(
        "Perceiver",
        "Perceiver",
        {"d_model": 16, "d_latents": 32, "num_latents": 8},
        num_blocks=1,
        num_self_attends_per_block=3,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        num_labels=3,
        attention_probs_dropout_prob=0.0,
        batch=lambda n, k: {k.replace("input_ids", "inputs"): v for k, v in classes(n, k).items()},
    ),
]
