"""The fields of a config.json: their meaning here, and the values that can be trained.

Every known field is in one of the tables below or in the model's family. An unknown field, or a value for anything
other than the plain dense decoder, is refused by name, because ignoring it would silently train a different model.
Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icrl_megatron.model.families import FAMILIES
from icrl_megatron.model.family import Family, Only
from icrl_megatron.utils.errors import ConfigError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text file that Git checks out in place of a large file."""

SIZES = {
    "hidden_size": "width of the residual stream",
    "intermediate_size": "width of the MLP",
    "num_attention_heads": "query heads",
    "num_hidden_layers": "decoder layers",
    "num_key_value_heads": "key and value heads",
    "vocab_size": "rows of the embedding and of the head, padding rows included",
}
"""Required positive integers. transformers has defaults for them, but they fit one model size only."""

DEFAULTS: dict[str, int | float | bool] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Optional fields that affect the computation, with transformers' defaults."""

ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
"""Checked by rope.py, because they depend on each other."""


_QUANTISED = "the weights are quantized; use the bf16 folder, e.g. Qwen3-8B instead of Qwen3-8B-FP8"
_DECODER = "only the plain causal decoder can be trained; set it to false"

ONLY: dict[str, Only] = {
    "add_cross_attention": Only((False, None), _DECODER),
    "attention_dropout": Only((0.0,), "attention dropout is not supported; set it to 0.0"),
    "auto_map": Only((), "the folder has its own model code, which is not run; use a folder without it"),
    "chunk_size_feed_forward": Only((0, None), "chunked MLPs are not supported; set it to 0"),
    "cross_attention_hidden_size": Only((None,), _DECODER),
    "dtype": Only((None, "float32", "bfloat16", "float16", "float64"), _QUANTISED),
    "torch_dtype": Only((None, "float32", "bfloat16", "float16", "float64"), _QUANTISED),
    "hidden_act": Only(("silu",), "only silu is supported; use a folder trained with it"),
    "is_causal": Only((True,), "only causal attention is supported; use a causal language model"),
    "is_decoder": Only((False, None), _DECODER),
    "is_encoder_decoder": Only((False,), _DECODER),
    "mlp_bias": Only((False, None), "MLP biases are not supported; use a folder without them"),
    "output_attentions": Only((False, None), "it changes how attention is computed; set it to false"),
    "output_hidden_states": Only((False, None), "hidden states are not collected; set it to false"),
    "partial_rotary_factor": Only((1.0, None), "only whole heads are rotated; delete it if it should be 1"),
    "pruned_heads": Only((None, {}), "pruned heads are not supported; use the folder before pruning"),
    "quantization": Only((None,), _QUANTISED),
    "quantization_config": Only((None,), _QUANTISED),
    "return_dict": Only((True, None), "the engine needs it; set it to true"),
    "tie_encoder_decoder": Only((False, None), _DECODER),
    "torchscript": Only((False, None), "tracing is not supported; set it to false"),
    "use_bfloat16": Only((False, None), "the run sets the dtype, not the model; set it to false"),
    "use_mrope": Only((False, None), "multimodal positions are not supported; set it to false for a text model"),
    "use_sliding_window": Only(
        (False,), "sliding windows are not supported; set it to false if all layers have full attention"
    ),
}

WITHOUT_EFFECT: dict[str, tuple[type, ...]] = {
    "_attn_implementation": (str, type(None)),
    "attn_implementation": (str, type(None)),
    "bos_token_id": (int, type(None)),
    "eos_token_id": (int, list, type(None)),
    "id2label": (dict, type(None)),
    "initializer_range": (float,),
    "label2id": (dict, type(None)),
    "max_new_tokens": (int, type(None)),
    "max_window_layers": (int,),
    "num_labels": (int,),
    "sliding_window": (int, type(None)),
    "use_cache": (bool,),
}
"""Fields with no effect here; their types are checked because transformers checks them. Stop ids come from the
tokenizer, no weight is initialized at random, and the two window fields apply only with use_sliding_window."""

NOTES = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
    *("_attn_implementation_autoset", "tokenizer_class", "prefix"),
    *("unsloth_fixed", "unsloth_version", "finetuning_task", "task_specific_params", "problem_type", "tf_legacy_loss"),
    *("sep_token_id", "unk_token_id", "decoder_start_token_id"),
    # Defaults of `generate` that old versions of transformers stored here. Sampling uses the settings instead.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}
"""Fields that describe the folder. The computation does not depend on them."""

_CHECKED_HERE = {"layer_types", "pad_token_id", "head_dim", "model_type", "architectures"}
KNOWN = {*SIZES, *DEFAULTS, *ROPE, *ONLY, *WITHOUT_EFFECT, *NOTES, *_CHECKED_HERE}


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.json and fills in absent DEFAULTS.

    Raises ConfigError naming the file, field, value and remedy if a field is unknown or its value is not supported.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a model's configuration (not a JSON object); check model.path")
    family = _family(raw, path)
    checked = {**ONLY, **family.only}
    for name, only in checked.items():
        if name in raw and not any(_same(raw[name], value) for value in only.values):
            raise ConfigError(f"{path}: {name}={_shown(raw[name])}: {only.why}")
    for name, value in raw.items():
        if name not in KNOWN and name not in family.only and value is not None:
            raise ConfigError(
                f"{path}: {name}={_shown(value)}: unknown field, which may change the model; delete it if the weights "
                "do not depend on it"
            )
    fields = {**DEFAULTS, **raw}
    for name in (*SIZES, "max_position_embeddings"):
        fields[name] = _size(fields, name, path)
    fields.setdefault("head_dim", family.head_dim or _even_heads(fields, path))
    fields["head_dim"] = _size(fields, "head_dim", path)
    _check_numbers(fields, path)
    _check_layers(fields, path)
    return fields


def _family(raw: dict[str, Any], path: Path) -> Family:
    if "model_type" not in raw:
        raise ConfigError(f"{path}: not a model's configuration (model_type is missing); check model.path")
    name = raw["model_type"]
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type={_shown(name)}: only dense {' and '.join(FAMILIES)} can be trained; use such a folder"
        )
    family, given = FAMILIES[name], raw.get("architectures")
    if given not in (None, [family.architecture]):
        raise ConfigError(
            f"{path}: architectures={_shown(given)}: the folder is not a causal language model; use one for "
            f"{family.architecture}"
        )
    return family


def _even_heads(fields: dict[str, Any], path: Path) -> int:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads:
        raise ConfigError(
            f"{path}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is missing; "
            "copy the model's config.json again"
        )
    return int(hidden // heads)


def read_json(path: Path) -> Any:
    """Raises ConfigError if a JSON file of a model's folder is missing, unreadable, damaged or a Git LFS pointer."""
    try:
        content = path.read_bytes()
        require_not_lfs(path, content)
        return json.loads(content.decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the file is missing; check model.path, or copy the model's folder again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); copy the model's folder again") from error


def name_dtype(path: Path, dtype: str) -> None:
    """Writes the dtype of the weights (torch's name) into a config.json, under both names if it has both."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["dtype"] = dtype
    if "torch_dtype" in fields:  # read by transformers 4
        fields["torch_dtype"] = dtype
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def require_not_lfs(path: Path, begin: bytes) -> None:
    """Raises ConfigError if `begin`, the first bytes of a file, are those of a Git LFS pointer."""
    if begin.startswith(LFS_POINTER):
        raise ConfigError(
            f"{path}: a Git LFS pointer instead of the file; run `git lfs pull` in {path.parent}, or download the "
            "model again"
        )


def _size(fields: dict[str, Any], name: str, path: Path) -> int:
    value = fields.get(name)
    if value is None and name == "num_key_value_heads" and name in fields:
        value = fields["num_attention_heads"]  # transformers' meaning of null
    if name not in fields:
        raise ConfigError(f"{path}: {name} is missing; copy the model's config.json again")
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name}={value!r}: not a positive integer; copy the model's config.json again")
    return value


def _check_numbers(fields: dict[str, Any], path: Path) -> None:
    epsilon = fields["rms_norm_eps"]
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise ConfigError(f"{path}: rms_norm_eps={epsilon!r}: expected a small positive number, e.g. 1e-06")
    if not isinstance(fields["tie_word_embeddings"], bool):
        raise ConfigError(f"{path}: tie_word_embeddings={fields['tie_word_embeddings']!r}: expected true or false")
    padding = fields.get("pad_token_id")
    if padding is not None and (type(padding) is not int or padding >= fields["vocab_size"]):
        raise ConfigError(
            f"{path}: pad_token_id={padding!r} is not below vocab_size={fields['vocab_size']}; set it to null"
        )
    ends = fields.get("eos_token_id")
    if isinstance(ends, list) and not all(type(end) is int for end in ends):
        raise ConfigError(f"{path}: eos_token_id={_shown(ends)}: expected integers; copy the model's config.json again")
    for name, types in WITHOUT_EFFECT.items():
        if name in fields and type(fields[name]) not in types:
            listed = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ConfigError(f"{path}: {name}={_shown(fields[name])}: expected {listed}; correct or delete it")


def _check_layers(fields: dict[str, Any], path: Path) -> None:
    kinds, layers = fields.get("layer_types"), fields["num_hidden_layers"]
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            f"{path}: layer_types={_shown(kinds)}: expected one kind for each of the {layers} layers "
            "(num_hidden_layers); delete it if all are full_attention"
        )
    for kind in kinds:
        if kind != "full_attention":
            raise ConfigError(
                f"{path}: layer_types has {kind!r}: only full_attention is supported; use a folder with full attention "
                "in all layers"
            )


def _same(a: object, b: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
