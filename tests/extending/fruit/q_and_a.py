"""A chat template: `Q: question`, a newline, `A: answer`."""

from __future__ import annotations

from voco.job.chat_templates import EOS, ChatTemplate, PromptPart

TEMPLATE = ChatTemplate(
    user=((PromptPart("Q: "),), (PromptPart("\n"),)), assistant=((PromptPart("A:"),), (EOS,)), answer_space=" "
)
