"""The terminal client, with a server whose engine follows a script, and with that engine in this process."""

import io
import sys
from pathlib import Path

import pytest

from dsv3_jax.data.special_tokens import special_tokens
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.chat import Local, Remote, converse
from dsv3_jax.http_api.chat_template import ChatTemplate
from dsv3_jax.http_api.service import Service
from tests.commands import dsv3
from tests.http_api.fake import TEMPLATE, FakeEngine, serving, tokenizer

KEY = "a-key-for-the-tests-01"


def said(partner, *lines: str, system: str | None = None, **options) -> list[str]:
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        converse(partner, iter(lines), {"max_tokens": 5} | options, system)
        return sys.stdout.getvalue().splitlines()
    finally:
        sys.stdout = out


def test_with_a_server():
    with serving([KEY]) as client:
        url = "http://{}:{}".format(*client.address)
        partner = Remote(url, KEY)
        assert said(partner, "hi", "", "more") == ["The quick brown fox"] * 2
        assert client.engine.script  # the second prompt has the first answer
        assert said(Remote(f"{url}/v1/", KEY), "x" * 3000, "hi")[0].startswith(f"[{url}/v1/ answers 400: the prompt has ")
        client.engine.failing = "out of\nmemory"
        assert said(partner, "hi") == [f"[{url}: out of memory]"]
        with pytest.raises(UserError, match="answers 401: no or a wrong API key"):
            Remote(url, None)
        with pytest.raises(UserError, match="answers 404"):
            Remote(f"{url}/other", KEY)
    with pytest.raises(UserError, match="Connection refused"):
        Remote(url, KEY)
    for wrong in ("ftp://x", "http://", "://"):
        with pytest.raises(UserError, match="is no address of a server"):
            Remote(wrong, None)


def test_a_model_here_and_one_without_a_template():
    its = tokenizer()
    engine = FakeEngine(its)
    for template in (ChatTemplate(TEMPLATE, {}), None):
        local = Local(Service(engine, its, special_tokens(its), template, "it"))
        assert said(local, "hi", "x" * 3000, system="s" if template else None)[0] == "The quick brown fox"
        assert not engine.running
    engine.close()


def test_the_command(tmp_path: Path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with serving([KEY]) as client:
        url = "http://{}:{}".format(*client.address)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        done = dsv3("chat", url, "--api-key-file", str(keys), "--max-tokens", "5", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "The quick brown fox\n")
        done = dsv3("chat", url, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"dsv3: error: {url} answers 401: ")
