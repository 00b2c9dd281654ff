"""Chat templates: from a checkpoint's files to a prompt; in a sandbox, and with what transformers gives a template."""

import json

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.http_api.chat_template import ChatTemplate, chat_template

HELLO = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "é"}]
# the released model's, without what it has for tools
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)


def rendered(source: str, messages=HELLO, **special: str) -> str:
    return ChatTemplate(source, special).render(messages)


def test_the_released_models_template():
    """By hand, from the encoding that DeepSeek documents."""
    turns = [*HELLO, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "go"}]
    expected = "<bos>be <b><｜User｜>é<｜Assistant｜>ok<｜end▁of▁sentence｜><｜User｜>go<｜Assistant｜>"
    assert rendered(DEEPSEEK, turns, bos_token="<bos>") == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "be <b>"}'),  # no HTML
        ("{{ messages[1].content | tojson }}", '"é"'),
        ("{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n", "system\nuser\n"),  # blocks' lines leave no blank ones
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% break %}{% endfor %}", "system"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ eos_token }}{{ tools }}", "<end>"),
    ],
)
def test_what_a_template_may_use(source, text):
    assert rendered(source, eos_token="<end>") == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__['os'] }}",
        "{% for i in range(10**9) %}{% endfor %}", "{{ cycler.__init__.__globals__.os.popen('x') }}", "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}", "{{ messages[0].nothing.more }}", "{{ raise_exception('no system') }}",
    ],
)  # fmt: skip
def test_what_it_may_not(source):
    with pytest.raises(UserError, match="the checkpoint's chat template refuses them"):
        rendered(source)


def test_where_it_is_found():
    template, config = b"{{ bos_token }}A", {"chat_template": "B{{ bos_token }}", "bos_token": {"content": "<s>"}}
    files = {"chat_template.jinja": template, "tokenizer_config.json": json.dumps(config).encode()}
    several = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    for companions, text in (
        (files, "<s>A"), ({"tokenizer_config.json": files["tokenizer_config.json"]}, "B<s>"),
        ({"tokenizer_config.json": json.dumps(several).encode()}, "D"),
        ({"chat_template.json": b'{"chat_template": "J"}'}, "J"),
    ):  # fmt: skip
        found = chat_template(companions)
        assert found is not None
        assert found.render(HELLO) == text
    assert chat_template({"tokenizer_config.json": b'{"chat_template": 5}'}) is None
    assert chat_template({}) is None
    with pytest.raises(UserError, match="cannot be read"):
        chat_template({"chat_template.jinja": b"{% if %}"})
