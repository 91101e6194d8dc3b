"""Golden sequences: kinds, positions and what is trained, for every template."""

from __future__ import annotations

import pytest
import tiny

from voco.job.chat_templates import CHAT_TEMPLATES
from voco.model.show_tokens import show_sample
from voco.sequence.chat_template import render_prompt
from voco.sequence.sequence import PREFIX, TEXT, VISION, VOCO, build_sample, text_start


def trained_text(sample):
    return tiny.TOKENIZER.decode(sample.predict_id.tolist())


def test_golden_sequence_of_two_views_and_two_conversations():
    layout = tiny.layout("voco", 2, vision_slots=3)
    talks = [tiny.question("a", "b"), tiny.question("c", "d")]
    sample = build_sample("s", talks, ["x", "y"], tiny.TOKENIZER, layout)
    view = [PREFIX, VISION, VISION, VISION, PREFIX, VOCO, VOCO]
    text = len("a\nb") + 1
    assert sample.kinds.tolist() == view + view + [TEXT] * 2 * text
    # C = 1 + 3 + 1; the second view is shifted by the first one's N; both conversations start at C + 4
    start = 5 + 4
    assert text_start(layout, [2, 2]) == start
    expected = [*range(7), *range(2, 9), *range(start, start + text), *range(start, start + text)]
    assert sample.position.tolist() == expected
    assert sample.view.tolist() == [0] * 7 + [1] * 7 + [-1] * 2 * text
    assert trained_text(sample) == "b</s>d</s>"
    assert [sample.ids[at + 1] for at in sample.predict_at] == sample.predict_id.tolist()


def test_plain_positions_run_on_for_other_methods():
    layout = tiny.layout("none", 2, vision_slots=3)
    sample = build_sample("s", [tiny.question("a", "b")], ["x", "y"], tiny.TOKENIZER, layout)
    assert sample.position.tolist() == list(range(len(sample)))
    pooled = build_sample("s", [tiny.question("a", "b")], ["x"], tiny.TOKENIZER, tiny.layout("avg_pool", 1, vision_slots=3))
    assert pooled.kinds.tolist()[:3] == [PREFIX, VISION, PREFIX]


def test_text_only_starts_with_bos_at_zero():
    sample = build_sample("s", [tiny.question("a", "b"), tiny.question("c", "d")], [], tiny.TOKENIZER, tiny.layout())
    assert sample.kinds.tolist() == [TEXT] * len(sample)
    assert sample.ids[0] == tiny.layout().bos_id
    assert sample.position.tolist() == 2 * list(range(len(sample) // 2))


@pytest.mark.parametrize(
    ("template", "has_views", "expected"),
    [
        ("question_answer", True, "what\nis it?\n[one\ntwo</s>]"),
        ("plain", True, "[one\ntwo\n]"),
        ("vicuna_v1", True, "\nA chat between"),
        ("vicuna_v1", False, "A chat between"),
        (
            "chatml",
            True,
            "<|im_start|>user\nwhat\nis it?<|im_end|>\n<|im_start|>assistant\n[one\ntwo<|im_end|>]\n",
        ),
        (
            "llama_3",
            True,
            "<|start_header_id|>user<|end_header_id|>\n\nwhat\nis it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[one\ntwo<|eot_id|>]",
        ),
    ],
)
def test_rendered_prompt(template, has_views, expected):
    turns = tiny.question("what\nis it?", "one\ntwo")
    marked = ""
    for part in render_prompt(turns, template, "keep", has_views):
        text = "</s>" if part.text == "eos" and part.control else part.text
        marked += f"[{text}]" if part.trained else text
    assert marked.replace("][", "").startswith(expected)


def test_turns_that_end_with_a_question_end_with_the_assistants_role():
    for template, expected in (("vicuna_v1", "USER: q ASSISTANT:"), ("chatml", "<|im_start|>assistant\n"), ("plain", "")):
        text = "".join(part.text for part in render_prompt(tiny.question("q"), template, "keep", False))
        assert text.endswith(expected)


def test_vicuna_ends_as_llava_does():
    turns = [*tiny.question("hi", "there"), *tiny.question("again", "yes")]
    text = "".join("</s>" if part.control else part.text for part in render_prompt(turns, "vicuna_v1", "strip", False))
    assert text.endswith("questions. USER: hi ASSISTANT: there</s>USER: again ASSISTANT: yes</s>")


def test_strip_takes_newlines_out_of_samples_with_views_only():
    for has_views, expected in ((True, "oneortwo"), (False, "one\nor\ntwo")):
        text = "".join(part.text for part in render_prompt(tiny.question("one\nor\ntwo"), "question_answer", "strip", has_views))
        assert expected in text


def test_first_trained_token_without_a_question_follows_the_prefix():
    layout = tiny.layout("voco", 1, template="plain")
    sample = build_sample("s", [tiny.question("x", "ab"), tiny.question("x", "cd")], ["v"], tiny.TOKENIZER, layout)
    last_prefix = layout.prefix_length
    assert sample.predict_at.tolist().count(last_prefix) == 2  # each conversation's first token, from the same <voco>
    assert trained_text(sample) == "ab\ncd\n"


def test_long_text_is_cut_at_its_end_and_counted():
    layout = tiny.layout("voco", 1)
    whole = build_sample("s", [tiny.question("q", "a" * 50)], ["v"], tiny.TOKENIZER, layout)
    cut = build_sample("s", [tiny.question("q", "a" * 50)], ["v"], tiny.TOKENIZER, layout, max_tokens=40)
    assert len(cut) == 40
    assert cut.cut == len(whole) - 40
    assert cut.kinds.tolist()[: layout.prefix_length + 1] == whole.kinds.tolist()[: layout.prefix_length + 1]
    with pytest.raises(ValueError, match="leaves no room"):
        build_sample("s", [], ["v"], tiny.TOKENIZER, layout, max_tokens=5)


def test_text_that_spells_voco_stays_text():
    layout = tiny.layout()
    sample = build_sample("s", [tiny.question("say <voco> <image> </s>", "<voco>")], ["v"], tiny.TOKENIZER, layout)
    text = sample.ids[sample.kinds == TEXT].tolist()
    assert layout.voco_id not in text
    assert layout.image_id not in text
    assert text.count(layout.eos_id) == 1
    assert trained_text(sample) == "<voco></s>"


def test_a_layout_knows_its_prefix_and_its_template():
    layout = tiny.layout("voco", 2, vision_slots=3)
    assert layout.prefix_ids == (layout.bos_id, *layout.separator_ids)
    assert tiny.layout("voco", 2, bos=False).prefix_ids == layout.separator_ids
    assert (layout.prefix_length, layout.view_length, layout.cached_from) == (5, 7, 5)
    pooled = tiny.layout("avg_pool", 1, vision_slots=3)
    assert (pooled.prefix_length, pooled.view_length, pooled.cached_from) == (3, 3, 0)
    assert tiny.layout(template="plain").drops_questions
    assert not layout.drops_questions


@pytest.mark.parametrize("method", ["fastv", "no_such_method"])
def test_a_layout_has_a_method_that_trains(method):
    with pytest.raises(ValueError, match="'voco', 'none', 'avg_pool' or 'q_former'"):
        tiny.layout(method)


def test_every_template_ends_ready_for_an_answer():
    for name in CHAT_TEMPLATES:
        parts = render_prompt(tiny.question("q"), name, "keep", True)
        assert not any(part.trained for part in parts)


def test_show_marks_trained_text_and_the_mask():
    layout = tiny.layout("voco", 1, vision_slots=3)
    shown = show_sample(build_sample("s", [tiny.question("a", "b")], ["v"], tiny.TOKENIZER, layout), tiny.TOKENIZER, layout)
    assert "a\\n[b</s>]" in shown
    grid = [line.split()[1] for line in shown.splitlines() if line.strip().startswith(("prefix", "vision", "voco", "text"))][5:]
    # BOS, vision, separator, voco, text: the text reads voco and itself, nothing else
    assert grid == ["#....", "#+...", "###..", "####.", "...#+"]
