"""Which files go with a model or its tokenizer, where they are kept, and what is not taken along."""

import json

import pytest

from dsv3_jax.data.companions import about_text, about_weights, beside, fields, merged, read_companions, write_companions
from dsv3_jax.errors import UserError

TEXT = {
    "generation_config.json": b'{"eos_token_id": 1}', "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}", "tokenizer.model": b"\x00\xff", "tokenizer.model.v3": b"x", "tiktoken.model": b"x",
    "qwen.tiktoken": b"x", "tekken.json": b"{}", "vocab.json": b"{}", "merges.txt": b"a b", "chat_template.jinja": b"{{ x }}",
    "chat_template.json": b"{}", "tokenization_kimi.py": b"import os", "tool_declaration_ts.py": b"import re",
    "additional_chat_templates/tool_use.jinja": b"{{ y }}",
}  # fmt: skip
RIGHTS = dict.fromkeys(("LICENSE", "LICENSE-CODE", "LICENCE.txt", "NOTICE", "THIRD_PARTY_NOTICES.md", "USE_POLICY.md"), b"text")
CONFIG = {"config.json": b'{"bos_token_id": 0, "pad_token_id": 1, "pretraining_tp": 1}'}
OTHERS = (
    "tokenizer.json", "README.md", "model.safetensors", "tokenizer.bin", "tokenizer.pkl", "modeling_deepseek.py",
    "configuration_deepseek.py", ".gitattributes", "secret.pem", "train.py", "evaluation.model", "vocabulary of my thesis.md",
    "additional_chat_templates/notes.md", "others/chat_template.jinja",
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    for name, content in (TEXT | RIGHTS | CONFIG | dict.fromkeys(OTHERS, b"other")).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / "tokenizer_files").mkdir()
    (directory / "additional_chat_templates/folder.jinja").mkdir()
    return directory


def test_files_that_go_with_a_model_are_kept_byte_for_byte(source, tmp_path):
    found = read_companions(source)
    assert found == TEXT | RIGHTS | CONFIG
    (tmp_path / "kept").mkdir()
    write_companions(tmp_path / "kept", found)
    assert read_companions(tmp_path / "kept") == {}  # another folder that is called huggingface
    (tmp_path / "kept/config.yaml").touch()  # a run's or an import's
    assert read_companions(tmp_path / "kept") == found
    write_companions(tmp_path / "kept", {})  # nothing is taken away, and nothing made for nothing
    assert read_companions(tmp_path / "kept") == found
    write_companions(tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "source"]
    assert beside(str(source / "tokenizer.json")) == found
    assert read_companions(tmp_path / "nothing") == {}


def test_a_tokenizer_takes_its_files_along_and_leaves_the_weights_theirs(source):
    found = read_companions(source)
    its = about_text(found)
    assert {name: its[name] for name in TEXT} == TEXT
    assert set(its) == {*TEXT, "config.json"}
    assert fields(its, "config.json") == {"bos_token_id": 0, "pad_token_id": 1}
    weights = about_weights(found)
    assert set(weights) == {*RIGHTS, "config.json"}
    assert fields(weights, "config.json") == {"pretraining_tp": 1}
    assert about_text({"LICENSE": b"x"}) == {}
    assert merged({}, {}) == {}
    both = merged(weights, {"config.json": b'{"bos_token_id": 7}', "tokenizer.model": b"new"})
    assert fields(both, "config.json") == {"pretraining_tp": 1, "bos_token_id": 7}
    assert (both["tokenizer.model"], both["LICENSE"]) == (b"new", b"text")
    for name in found.keys() - {"config.json"}:  # of its own, a model loses nothing
        assert merged(found, its)[name] == found[name]
    assert fields(merged(found, its), "config.json") == json.loads(CONFIG["config.json"])


def test_bad_companions_are_refused_by_name(source, tmp_path):
    (source / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_companions(source)
    (source / "generation_config.json").write_text("[]")
    assert fields(read_companions(source), "generation_config.json") == {}
    (tmp_path / "key").write_text("private")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"chat_template\.jinja links to .*key, outside of the checkpoint"):
        read_companions(source)


def test_a_folder_of_templates_elsewhere_is_refused(source, tmp_path):
    """A link to the folder would lead out of the checkpoint as one to a file does."""
    (source / "additional_chat_templates").rename(tmp_path / "private")
    (source / "additional_chat_templates").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"tool_use\.jinja links to .*private/tool_use\.jinja, outside of the checkpoint"):
        read_companions(source)


def test_links_within_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/ffff").write_text("{{ x }}")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/ffff")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates/rag.jinja").symlink_to("../../../blobs/ffff")
    found = {"chat_template.jinja": b"{{ x }}", "additional_chat_templates/rag.jinja": b"{{ x }}"}
    assert read_companions(snapshot) == found


def test_companions_are_no_more_than_memory_holds(source):
    for i in range(5):
        with open(source / f"tokenizer.part{i}", "wb") as file:
            file.truncate(60 * 2**20)
    with pytest.raises(UserError, match=r"the files beside the weights, up to tokenizer\.part4, have more than 268,435,456"):
        read_companions(source)


def test_halves_of_surrogate_pairs_stay_as_they_were_spelt():
    config = {"config.json": b'{"_name_or_path": "\\ud800", "x": "\xc3\xa9"}'}
    (written,) = about_weights(config).values()
    assert b'"\\ud800"' in written
    assert json.loads(written) == json.loads(config["config.json"]) == {"_name_or_path": "\ud800", "x": "é"}
