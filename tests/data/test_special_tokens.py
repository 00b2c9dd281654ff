"""Begin and end tokens: which files name them, in which order, and what other programs are told about them."""

import json

import pytest
from tokenizers import Tokenizer, models, processors

from dsv3_jax.data.special_tokens import SpecialTokens, check_stated, special_tokens, with_begin_added
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError

NAMES = ["[BOS]", "[EOS]", "<|im_end|>", "[PAD]"]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of other names than ours, with these ids."""
    described = json.loads(train_tokenizer(["the sea and the ships"], 290).to_str())
    vocab = {token: i + 2 for token, i in described["model"]["vocab"].items() if i > 1}
    token = described["added_tokens"][0]
    described["added_tokens"] = [token | {"id": i, "content": name} for i, name in enumerate(NAMES)]
    described["model"]["vocab"] = {name: i for i, name in enumerate(NAMES)} | vocab
    return Tokenizer.from_str(json.dumps(described))


BOS, EOS, IM_END, PAD = range(4)


@pytest.mark.parametrize(
    ("files", "begin", "ends"),
    [
        ({}, BOS, (EOS, IM_END)),  # by known names
        ({"generation_config": {"eos_token_id": IM_END}}, BOS, (IM_END,)),
        ({"generation_config": {"eos_token_id": [IM_END, EOS], "bos_token_id": None}}, BOS, (IM_END, EOS)),
        ({"config": {"bos_token_id": PAD, "eos_token_id": EOS}, "generation_config": {"bos_token_id": EOS}}, EOS, (EOS,)),
        ({"config": {"eos_token_id": EOS}, "generation_config": {"eos_token_id": IM_END}}, BOS, (IM_END, EOS)),
        ({"tokenizer_config": {"bos_token": {"content": "[PAD]"}, "eos_token": "<|im_end|>"}}, PAD, (IM_END,)),
        ({"special_tokens_map": {"eos_token": "[EOS]"}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, BOS, (IM_END, EOS)),
        ({"config": {"bos_token_id": 163584, "eos_token_id": [163585, -1, 2**70]}}, BOS, (EOS, IM_END)),  # not the tokenizer's
        ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<unknown>"}}, BOS, (EOS, IM_END)),
    ],
)
def test_files_say_which_tokens_begin_and_end_a_text(tokenizer, files, begin, ends):
    companions = {f"{name}.json": json.dumps(fields).encode() for name, fields in files.items()}
    assert special_tokens(tokenizer, companions) == SpecialTokens(begin, ends)


@pytest.mark.parametrize(
    ("file", "fields", "expected"),
    [
        ("config", {"eos_token_id": "2"}, "config.json: eos_token_id=2 must be the id of a token, or a list of ids"),
        ("generation_config", {"eos_token_id": [[1]]}, "generation_config.json: eos_token_id"),
        ("generation_config", {"bos_token_id": True}, "generation_config.json: bos_token_id=True"),
        ("tokenizer_config", {"bos_token": 3}, "tokenizer_config.json: bos_token=3 must be a token's text"),
        ("special_tokens_map", {"eos_token": "\ud800"}, "eos_token='\\ud800' must be a token's text"),
    ],
)
def test_what_is_no_token_is_refused_by_name(tokenizer, file, fields, expected):
    companions = {f"{file}.json": json.dumps(fields).encode()}
    for read in (check_stated, lambda companions: special_tokens(tokenizer, companions)):  # by an import, and later
        with pytest.raises(UserError) as error:
            read(companions)
        assert expected in str(error.value)


def test_a_prompt_is_begun_once():
    special = SpecialTokens(7, (9,))
    assert special.begun([1, 2]) == special.begun([7, 1, 2]) == [7, 1, 2]
    assert special.begun([]) == [7]
    assert SpecialTokens(None, (9,)).begun([1, 2]) == [1, 2]


def test_documents_need_an_end_but_no_begin():
    assert SpecialTokens(7, (9, 8)).frame == ([7], [9])
    assert SpecialTokens(None, (9,)).frame == ([], [9])
    with pytest.raises(UserError, match=r"no end-of-text token; name it as eos_token in tokenizer_config\.json"):
        _ = SpecialTokens(7, ()).frame


OTHERS = {
    "none": None,
    "offsets alone": processors.ByteLevel(trim_offsets=False),
    "several": processors.Sequence([processors.ByteLevel(trim_offsets=True), processors.ByteLevel(trim_offsets=False)]),
    "another token": processors.TemplateProcessing(single="[PAD] $A", pair="[PAD] $A $B", special_tokens=[("[PAD]", PAD)]),
    "an end too": processors.TemplateProcessing(
        single="[BOS] $A [EOS]", pair="[BOS] $A $B", special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)]
    ),
    "the right one": processors.TemplateProcessing(single="[BOS] $A", pair="[BOS] $A $B", special_tokens=[("[BOS]", BOS)]),
}


@pytest.mark.parametrize("before", OTHERS)
@pytest.mark.parametrize("begin", [BOS, None])
def test_other_programs_begin_a_text_as_its_documents_began(tokenizer, before, begin):
    """Whatever the post-processor was: asked for special tokens, the tokenizer gives the begin token, and no other."""
    its = Tokenizer.from_str(tokenizer.to_str())
    if OTHERS[before] is not None:
        its.post_processor = OTHERS[before]
    told = Tokenizer.from_str(with_begin_added(its, begin).to_str())
    first = [] if begin is None else [begin]
    for text in ("the sea", "", "<|im_end|>"):
        plain = its.encode(text, add_special_tokens=False).ids
        assert told.encode(text).ids == [*first, *plain]
        assert told.encode(text, add_special_tokens=False).ids == plain
    assert json.loads(told.to_str())["model"] == json.loads(its.to_str())["model"]
    if before == "offsets alone":  # they are measured as before
        assert told.encode("the sea").offsets[-1] == its.encode("the sea").offsets[-1]
    if before == "the right one" and begin is not None:
        assert told.to_str() == its.to_str()


def test_a_tokenizer_without_latin_letters_begins_texts_too():
    """One that knows no "a" and has nothing for what it does not know."""
    its = Tokenizer(models.WordLevel({"<s>": 0, "海": 1}, unk_token="<unk>"))
    assert with_begin_added(its, 0).encode("海").ids == [0, 1]
    assert with_begin_added(its, None).to_str() == its.to_str()
