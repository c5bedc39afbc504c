import json
from pathlib import Path

import pytest

from engine.errors import ChatTemplateError, CheckpointError, TokenizerError
from engine.tokenizer import TokenIdsOnly, Tokenizer
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tiny_tokenizer(write_tiny_model(tmp_path, "llama")))


def test_text_comes_back_from_its_ids(tiny: Tokenizer) -> None:
    text = "Freight,  not passengers: žluťoučký 貨物\n"
    ids = tiny.encode(text)
    assert len(ids) == len(text.encode())
    assert tiny.decode(ids) == text


def test_special_tokens_are_left_out_of_the_text(tiny: Tokenizer) -> None:
    assert tiny.decode([0, *tiny.encode("ab"), 1]) == "ab"


def test_a_chat_ends_where_the_answer_begins(tiny: Tokenizer) -> None:
    ids = tiny.render_chat([{"role": "user", "content": "hi"}])
    assert tiny.decode(ids) == "<user>hi\n<assistant>"


def test_a_template_that_refuses_says_why(tiny: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="unknown role judge"):
        tiny.render_chat([{"role": "judge", "content": "hi"}])


def test_a_tokenizer_without_a_template_refuses_chats_and_takes_text(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    tokenizer = Tokenizer.load(write_tiny_tokenizer(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.encode("hi")


def test_end_of_sequence_ids_are_the_tokenizers_and_the_configs(tmp_path: Path) -> None:
    write_tiny_tokenizer(write_tiny_model(tmp_path, "llama"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_token_ids == (1, 5)
    assert tokenizer.vocab_size == 256


def test_without_tokenizer_files_ids_are_all_there_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_model(tmp_path, "gpt2"))
    assert isinstance(tokenizer, TokenIdsOnly)
    assert tokenizer.decode([3, 1, 4]) == "3 1 4"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (256, (1,))
    with pytest.raises(TokenizerError, match="token ids"):
        tokenizer.encode("hi")
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    write_tiny_tokenizer(write_tiny_model(tmp_path, "llama"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_demo_model_brings_its_tokenizer_and_template(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("The capital of France") == [504, 3575, 282, 4649]
    ids = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == 1  # <|im_start|>, which decoding leaves out
    assert tokenizer.decode(ids).endswith("user\nhi\nassistant\n")
