"""Plain templates render as Jinja does, and templates that look into contents are left to Jinja."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from gristmill.tuning.models import CHAT_TEMPLATE
from gristmill.tuning.templates import plain


def chatml(content: str, before: str = "") -> str:
    """ChatML whose contents are written by `content`."""
    turn = "<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n"
    end = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + end


QWEN3 = (  # as Qwen3's: reasoning of earlier turns is cut off
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' and not(m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if m.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)
LLAMA = (  # as Llama 2's and 3's: alternation is checked, contents are trimmed
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set content = m['role'] + ': ' + m['content'] | trim + eos_token %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
FAST = {"own": CHAT_TEMPLATE, "chatml": chatml("{{ m.content }}"), "qwen3": QWEN3, "llama": LLAMA}
FAST["default"] = chatml("{{ m.content | default('x', true) }}")
# each looks into a content, or lets something else do so
SLOW = {
    "length": chatml("{{ m.content }}{{ m.content | length }}"),
    "equal": chatml("{% if m.content == 'a' %}!{% endif %}{{ m.content }}"),
    "slice": chatml("{{ m.content[:2] }}"),
    "replace": chatml("{{ m.content.replace('a', 'b') }}"),
    "replaced": chatml("{{ 'ab' | replace('a', m.content) | trim }}"),
    "upper": chatml("{{ m.content | upper }}"),
    "joined": chatml("{{ ([m.role, m.content] | join(' ')) | trim }}"),
    "tilde": chatml("{{ (m.role ~ m.content) | trim }}"),
    "plus": chatml("{{ ('' + m.content).strip() }}"),
    "format": chatml("{{ '%s' | format(m.content) | trim }}"),
    "percent": chatml("{{ ('%s' % m.content) | trim }}"),
    "block": chatml("{% set x %}{{ m.content }}{% endset %}{{ x | trim }}"),
    "macro": chatml("{{ f(m.content) | trim }}", "{% macro f(x) %}{{ x }}{% endmacro %}"),
    "filter": chatml("{% filter trim %}{{ m.content }}{% endfilter %}"),
    "json": chatml("{{ m | tojson }}"),
    "ascii": chatml("{{ m.content | tojson(ensure_ascii=true) }}"),
    "escape": chatml("{{ m.content | e }}"),
    "words": chatml("{{ m.content | wordcount }}"),
    "number": chatml("{{ m.content | int }}"),
    "loop": chatml("{% for c in m.content %}{{ c }}{% endfor %}"),
    "sequence": chatml("{% if m.content is sequence %}{{ m.content }}{% endif %}"),
    "same": chatml("{% if m.content in ['a', 'b'] %}{{ m.content }}{% endif %}"),
    "blank": chatml("{% if m.content | trim %}{{ m.content }}{% endif %}"),
    "repr": chatml("{{ [m.content] | string }}"),
    "twice": chatml("{{ m.content * 2 }}"),
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENT = st.text(st.sampled_from("ab \n\t<>&'\"{}%</think>\ue000\ue0010"), max_size=12) | st.sampled_from(
    ["</think>x", "<tool_response>a</tool_response>", "\n\n a \n", "{{ x }}"]
)


def jinja(template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    return str(render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **TOKENS)[0][0])


def fast(template: str, messages: list[dict[str, str]], prompt: bool) -> str | None:
    shape = tuple((turn["role"], turn["content"] != "") for turn in messages)
    variables = {"tools": None, "documents": None, "add_generation_prompt": prompt, **TOKENS}
    found = plain(template, shape, variables)
    return None if found is None else found.render([turn["content"] for turn in messages])


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=40)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.booleans())
def test_plain_templates_render_as_jinja_does(name: str, said: list[tuple[str, str]], prompt: bool) -> None:
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in said for role, text in zip(roles, pair, strict=True)]
    found = fast(FAST[name], messages, prompt)
    looked = name == "qwen3" and any("</think>" in t or t.startswith("<tool_response>") for p in said for t in p)
    assert found == jinja(FAST[name], messages, prompt) or (found is None and looked)


@pytest.mark.parametrize("name", SLOW)
def test_templates_that_look_into_contents_are_left_to_jinja(name: str) -> None:
    messages = [{"role": "user", "content": "a "}, {"role": "assistant", "content": " b"}]
    jinja(SLOW[name], messages, False)  # a template that works
    assert fast(SLOW[name], messages, False) is None


def test_a_template_that_refuses_says_so_through_jinja() -> None:
    twice = [{"role": "user", "content": "a"}] * 2
    assert fast(LLAMA, twice, False) is None
    with pytest.raises(Exception, match="roles must alternate"):
        jinja(LLAMA, twice, False)
