"""The built-in tiny model: an ordinary Hugging Face folder, one token per word, reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from icrl_megatron.model.tiny import CRITIC_TAGS, END, HEADERS, PAD, UNKNOWN, build_tiny, build_tokenizer
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable

WORDS = {"oak", "elm", "go", "kitchen", "don't", "<critic>"}


def all_words() -> set[str]:
    sets = (registry.get(name) for name in registry.names())
    return {word for task_set in sets if isinstance(task_set, Teachable) for word in task_set.vocabulary()}


@pytest.mark.parametrize("tied", [True, False])
def test_folder_is_an_ordinary_qwen3(tmp_path: Path, tied: bool) -> None:
    init = TinyModel(layers=3, tie_embeddings=tied)
    build_tiny(tmp_path / "deep" / "model", init, all_words(), seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model")
    assert isinstance(model, Qwen3ForCausalLM)
    config = model.config
    assert config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (init.hidden, init.ffn, 3)
    assert (config.num_attention_heads, config.num_key_value_heads) == (init.heads, init.kv_heads)
    assert config.head_dim == init.head_dim and config.max_position_embeddings == init.max_positions
    assert config.tie_word_embeddings is tied
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.self_attn.q_norm.weight" in names and "model.layers.2.self_attn.k_norm.weight" in names
    assert tokenizer.eos_token_id == config.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.pad_token_id == config.pad_token_id == tokenizer.convert_tokens_to_ids(PAD)


def test_seed_determines_the_weights_without_changing_global_state(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny(tmp_path / name, TinyModel(), WORDS, seed)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_every_word_is_one_token_and_text_round_trips(tmp_path: Path) -> None:
    words = all_words()
    build_tiny(tmp_path, TinyModel(layers=1), words, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = {PAD, END, UNKNOWN, *HEADERS}
    assert len(tokenizer) == len(words | special | set(CRITIC_TAGS))
    for word in words:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    text = " ".join(sorted(words))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(words) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("go  kitchen\n", add_special_tokens=False)) == "go kitchen"
    assert tokenizer.encode("hovercraft", add_special_tokens=False) == [tokenizer.unk_token_id]


def test_chat_template_adds_one_token_before_and_after_a_message() -> None:
    tokenizer = build_tokenizer(WORDS)
    messages = [
        {"role": "user", "content": " go kitchen "},
        {"role": "assistant", "content": "<critic> oak </critic>"},
        {"role": "system", "content": "elm"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|user|> go kitchen <|im_end|> <|assistant|> <critic> oak </critic> <|im_end|> <|user|> elm <|im_end|>"
    assert text.split() == [*expected.split(), "<|assistant|>"]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == text.split()
    # Decoded text keeps the critic's tags but not the control tokens.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "go kitchen <critic> oak </critic> elm"


def test_tags_are_tokens_without_spaces_around_them() -> None:
    tokenizer = build_tokenizer(["<plan>", "</plan>", "go", "a<b"])
    ids = tokenizer.encode("<plan>go</plan> a<b", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<plan>", "go", "</plan>", "a<b"]
    assert ids == tokenizer.encode("<plan> go </plan> a<b", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<plan> go </plan> a<b"


def test_words_must_be_single_tokens() -> None:
    for word in ("two words", ""):
        with pytest.raises(ValueError, match="one token"):
            build_tokenizer([word])
