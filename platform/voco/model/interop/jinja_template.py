"""A row of CHAT_TEMPLATES as the Jinja template of a processor, so that other software asks a model in its own words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from voco.job.chat_templates import CHAT_TEMPLATES, EOS, PromptPart
from voco.model.interop.llava_import import SPECIAL
from voco.sequence.chat_template import system_parts
from voco.sequence.sequence import SEPARATOR, Layout

# `content` is a string, or parts of which each is an image or a text
TEXT_OF = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set count = namespace(images=0) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{%- set count.images = count.images + 1 -%}{%- endfor -%}
{%- endfor -%}
"""


def jinja_template(layout: Layout, tokenizer: Any) -> str:
    """The prompts of `render_prompt`: every image with its `<voco>` tokens first, then the turns. BOS is the tokenizer's."""
    row, system = CHAT_TEMPLATES[layout.template], system_parts(layout.template, layout.system)

    def literal(parts: Sequence[PromptPart]) -> str:
        return _literal("".join(tokenizer.eos_token if part == EOS else part.text for part in parts))

    image = SPECIAL["image"] + SEPARATOR + SPECIAL["voco"] * layout.voco_tokens()
    strips = row.strips_newlines or layout.newlines == "strip"
    text = "text_of(message['content'])"
    shown = f"({text} | replace({_literal(chr(10))}, '') if count.images else {text})" if strips else text
    user = "" if row.drops_questions else f"{{{{- {literal(row.user[0])} + {shown} + {literal(row.user[1])} -}}}}"
    before, after = literal((*row.assistant[0], PromptPart(row.answer_space))), literal(row.assistant[1])
    return (
        f"{TEXT_OF}"
        f"{{%- if count.images -%}}{{{{- {_literal(image)} * count.images + {_literal(row.after_image)} -}}}}{{%- endif -%}}\n"
        f"{{{{- {literal(system)} -}}}}\n"
        f"{{%- for message in messages -%}}\n"
        f"{{%- if message['role'] == 'user' -%}}{user}\n"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- {before} + {shown} + {after} -}}}}\n"
        f"{{%- else -%}}{{{{- raise_exception('expected turns of user and assistant') -}}}}\n"
        f"{{%- endif -%}}\n"
        f"{{%- endfor -%}}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- {literal(row.assistant[0])} -}}}}{{%- endif -%}}"
    )


def _literal(text: str) -> str:
    """A string of Jinja, whose escapes are Python's."""
    return json.dumps(text)
