"""Rendering a chat template: text, marked spans, and from several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2 import TemplateError

from megatron_dattn.data.rendering import render_messages

SOURCE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}{% else %}"
    "{% generation %}A {{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)
ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}


def test_text_and_spans() -> None:
    assert render_messages(SOURCE, [ASKED, ANSWERED], {"bos_token": "<s>"}, marked=True) == (
        "<s>Q qA a",
        [(6, 9)],
    )
    assert render_messages(SOURCE, [ASKED], {"bos_token": "<s>"}, prompt=True) == ("<s>Q qA ", [])


def test_threads_do_not_mix_their_spans() -> None:
    def spans(length: int) -> list[tuple[int, int]]:
        answer = {"role": "assistant", "content": "a" * length}
        return render_messages(SOURCE, [ASKED, answer], {"bos_token": ""}, marked=True)[1]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(spans, range(200)))
    assert found == [[(3, 5 + length)] for length in range(200)]


def test_a_refusal_is_the_template_s() -> None:
    with pytest.raises(TemplateError, match="no such thing"):
        render_messages("{{ raise_exception('no such thing') }}", [ASKED], {})
