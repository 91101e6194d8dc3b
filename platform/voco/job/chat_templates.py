"""Chat templates: how turns become a prompt. A table of plain data; `sequence/chat_template.py` renders it."""

from __future__ import annotations

from dataclasses import dataclass

from voco.job.tables import Table


@dataclass(frozen=True)
class PromptPart:
    """A piece of a prompt. `text` is the string, or the name of a control token that is inserted by id."""

    text: str
    control: bool = False
    trained: bool = False


EOS = PromptPart("eos", control=True, trained=True)  # the tokenizer's own end of sequence
Parts = tuple[PromptPart, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are joined. Control tokens come from here only, never out of user text."""

    user: tuple[Parts, Parts]  # before and after a user turn
    assistant: tuple[Parts, Parts]  # before and after an assistant turn; the first part after it ends the answer
    system: tuple[Parts, Parts] | None = None  # before and after a system prompt; None: there is no room for one
    default_system: str = ""  # the system prompt where neither the job nor the model's directory has one
    after_image: str = ""  # comes first when the sample has views: the newline after the <voco> tokens
    answer_space: str = ""  # between the assistant's role and its text; part of the trained text
    drops_questions: bool = False  # captions only: such a model cannot read a question
    needs_control_tokens: bool = False  # which a tokenizer trained from scratch does not have
    strips_newlines: bool = False  # out of samples with views, whatever `text.newlines` says


def _control(name: str, trained: bool = False) -> PromptPart:
    return PromptPart(name, control=True, trained=trained)


def _llama_3_header(role: str) -> Parts:
    return (_control("<|start_header_id|>"), PromptPart(role), _control("<|end_header_id|>"), PromptPart("\n\n"))


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
RELEASED_SYSTEM = VICUNA_SYSTEM.replace("assistant. The", "assistant of the image. The")

CHAT_TEMPLATES = Table(
    "chat_templates",
    {
        # LLaVA-1.5: system USER: q ASSISTANT: a</s>USER: ...
        "vicuna_v1": ChatTemplate(
            system=((), (PromptPart(" "),)),
            default_system=VICUNA_SYSTEM,
            after_image="\n",
            user=((PromptPart("USER: "),), (PromptPart(" "),)),
            assistant=((PromptPart("ASSISTANT:"),), (EOS,)),
            answer_space=" ",
        ),
        # VoCo-LLaMA's released code: the same with its own system prompt, for text alone too, and without newlines
        "released_code": ChatTemplate(
            system=((), (PromptPart(" "),)),
            default_system=RELEASED_SYSTEM,
            after_image="\n",
            user=((PromptPart("USER: "),), (PromptPart(" "),)),
            assistant=((PromptPart("ASSISTANT:"),), (EOS,)),
            answer_space=" ",
            strips_newlines=True,
        ),
        # Mistral-Instruct up to version 2 of its tokenizer, and LLaVA-1.6 on it: [INST] q [/INST] a</s>[INST] ...
        "mistral_instruct": ChatTemplate(
            user=((PromptPart("[INST] "),), (PromptPart(" [/INST]"),)),
            assistant=((), (EOS,)),
            answer_space=" ",
        ),
        # LLaVA's alignment stage: the image, the caption, a newline
        "plain": ChatTemplate(user=((), ()), assistant=((), (PromptPart("\n", trained=True),)), drops_questions=True),
        # OpenAI's chat markup, as SmolLM2 and Qwen use it
        "chatml": ChatTemplate(
            system=((_control("<|im_start|>"), PromptPart("system\n")), (_control("<|im_end|>"), PromptPart("\n"))),
            user=((_control("<|im_start|>"), PromptPart("user\n")), (_control("<|im_end|>"), PromptPart("\n"))),
            assistant=(
                (_control("<|im_start|>"), PromptPart("assistant\n")),
                (_control("<|im_end|>", trained=True), PromptPart("\n")),
            ),
            needs_control_tokens=True,
        ),
        # Llama 3, and LLaVA on it
        "llama_3": ChatTemplate(
            system=(_llama_3_header("system"), (_control("<|eot_id|>"),)),
            user=(_llama_3_header("user"), (_control("<|eot_id|>"),)),
            assistant=(_llama_3_header("assistant"), (_control("<|eot_id|>", trained=True),)),
            needs_control_tokens=True,
        ),
        # the shortest one, for small models: the question, a newline, the answer
        "question_answer": ChatTemplate(user=((), (PromptPart("\n"),)), assistant=((), (EOS,))),
    },
    ChatTemplate,
)
