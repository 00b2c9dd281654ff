"""Text from tokens, against the tokenizer's own decoding of all, and stop strings against a search of the whole text."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dsv3_jax.http_api.text import ChoiceText, Detokenizer, StopFinder, offsets, token_bytes, token_name
from dsv3_jax.serve.request import Event, Finish, TokenLogprob
from tests.http_api.fake import SCRIPT, tokenizer

ITS = tokenizer()


def metaspace() -> Tokenizer:
    """As sentencepiece's tokenizers: bytes have tokens of their own, and a text's first space is none of its characters."""
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    its = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    its.decoder = decoders.Sequence([  # type: ignore[assignment]
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return its


def pushed(its: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(its)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.lists(st.integers(0, ITS.get_vocab_size() - 1), max_size=40))
def test_pieces_are_the_whole_text(tokens):
    """Also of tokens that are no UTF-8."""
    assert "".join(pushed(ITS, tokens)) == ITS.decode(tokens)


@given(st.text(max_size=30))
def test_no_piece_ends_within_a_character(text):
    pieces = pushed(ITS, ITS.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_tokenizer_with_spaces_of_its_own():
    its = metaspace()
    tokens = [1, 2, 1, 4 + 0xC3, 4 + 0xA9, 1]
    assert pushed(its, tokens) == ["a", "b", " a", "", "é", " a", ""]
    assert Detokenizer(its, [2]).push(1) == " a"  # it goes on after a prompt
    assert [token_bytes(its, token) for token in (1, 2, 4 + 0xC3)] == [b" a", b"b", b"\xc3"]


@given(
    st.text(st.sampled_from("ab"), max_size=40), st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4)
)
@example("aaab", ["aab"])  # a mismatch that leaves a shorter beginning
def test_stop_strings_are_found_where_the_first_of_them_ends(text, stops):
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = min(ends)[0] + min(ends)[1] if ends else None
    finder, found, sent = StopFinder(stops), None, 0
    for at, character in enumerate(text):
        found = finder.find(character)
        if found is not None:
            assert at + found == expected
            assert sent <= at + found, "text of a stop string was sent"
            return
        sent = at + 1 - finder.held
    assert expected is None
    assert finder.held == max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["fox", "— n", "ïve, 日", "本語 🎉", "e q", "zz", "T"]), max_size=3))
def test_text_and_logprobs_do_not_depend_on_how_events_are_cut(seed, stops):
    tokens = ITS.encode(SCRIPT, add_special_tokens=False).ids
    every = [TokenLogprob(token, -1.0, ()) for token in tokens]
    rng, results = random.Random(seed), []
    for most in (1, 9):
        choice, text, placed = ChoiceText(ITS, [5], stops, None), "", []
        at = 0
        while at < len(tokens):
            n = min(rng.randint(1, most), len(tokens) - at)
            last = Finish.LENGTH if at + n == len(tokens) else None
            piece = choice.push(Event(tuple(tokens[at : at + n]), tuple(every[at : at + n]), finish=last))
            text, placed, at = text + piece.text, [*placed, *piece.tokens], at + n
        results.append((text, placed, choice.finish))
    assert results[0] == results[1]
    text, placed, finish = results[0]
    assert finish is (Finish.STOP if any(stop in SCRIPT for stop in stops) else Finish.LENGTH)
    assert not any(stop in text for stop in stops)
    assert SCRIPT.startswith(text)
    assert all(token.offset < len(text) for token in placed) or not text


def test_offsets_and_names():
    tokens = ITS.encode("naïve 日本", add_special_tokens=False).ids
    assert b"".join(token_bytes(ITS, token) for token in tokens).decode() == "naïve 日本"
    starts = offsets(ITS, tokens)
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert token_name(b"\xe6\x97") == "bytes:\\xe6\\x97"
    assert token_name(" é".encode()) == " é"
    assert token_bytes(ITS, 0) == b"<|begin_of_text|>"


def test_after_the_end_nothing_comes():
    choice = ChoiceText(ITS, [5], ["x"], None)
    assert choice.push(Event((ITS.encode("axb").ids[0], *ITS.encode("xb").ids))).finish is Finish.STOP
    assert choice.push(Event((7,), finish=Finish.LENGTH)).text == ""


@pytest.mark.parametrize("token", [-1 % 2**31, 10**6])
def test_a_token_beyond_the_tokenizer_has_no_text(token):
    """The model's vocabulary may be larger."""
    assert pushed(ITS, [token]) == ["", ""]
    assert token_bytes(ITS, token) == b""
