"""``response_format``: whatever the model says, the answer follows the grammar."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.worker.engine.models import END, IMAGE, PLAIN_ROLE, byte_tokenizer
from visq.errors import EngineError, InvalidRequest, UnsupportedParameter
from visq.types import GenerationConfig
from worker.engine.config import SMALL_MODEL
from worker.engine.grammar import Grammar, GrammarCompiler
from worker.engine.params import resolve
from worker.engine.sampler import Sampler, SampleRow

BYTES = byte_tokenizer()
SMALL = AutoTokenizer.from_pretrained(SMALL_MODEL)
PADDED = 40
"""Columns of the logits without a token, as checkpoints have them."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dög", None]},
        "count": {"type": "integer", "minimum": 0, "maximum": 120},
        "sizes": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        "child": {"$ref": "#/$defs/leaf"},
    },
    "required": ["name", "kind", "count", "sizes", "child"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}


def regex(text: str) -> dict[str, Any]:
    return {"type": "regex_schema", "regex_schema": text}


def compiler(tokenizer: Any = BYTES) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer) + PADDED, [tokenizer.eos_token_id])


COMPILERS = {"bytes": compiler(), "small": compiler(SMALL)}
TOKENIZERS = {"bytes": BYTES, "small": SMALL}


def start(format: dict[str, Any], stop_ids: list[int] | None = None) -> Grammar:
    compiled = COMPILERS["bytes"].compile(format)
    assert compiled is not None
    return compiled.start([BYTES.eos_token_id] if stop_ids is None else stop_ids)


def allowed(grammar: Grammar) -> set[int]:
    words = grammar.bitmask()
    return {i for i in range(len(words) * 32) if int(words[i // 32]) >> i % 32 & 1}


def ids(text: str) -> list[int]:
    return list(BYTES.encode(text, add_special_tokens=False))


def write(name: str, format: dict[str, Any], seed: int, **config: Any) -> list[int]:
    """An answer of a model that has nothing to say but noise, without its stop token."""
    tokenizer = TOKENIZERS[name]
    vocab_size = len(tokenizer) + PADDED
    end_ids = {tokenizer.eos_token_id}
    gen_config = GenerationConfig(do_sample=True, random_seed=seed, top_k=0, **config)
    stop_ids = set() if gen_config.ignore_eos else end_ids
    (params,) = resolve(gen_config, vocab_size=vocab_size, end_ids=end_ids, stop_ids=stop_ids)
    compiled = COMPILERS[name].compile(format)
    assert compiled is not None
    grammar = compiled.start(params.stop_ids)
    sampler = Sampler(vocab_size, 1, torch.device("cpu"))
    sampler.begin(0, params)
    noise = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not grammar.finished:
        assert len(tokens) < 3000
        logits = torch.randn(1, vocab_size, generator=noise)
        logits[0, ids('"')[0] if name == "bytes" else SMALL.convert_tokens_to_ids('"')] += 4
        row = SampleRow(0, len(tokens), bitmask=grammar.bitmask())
        tokens.append(int(sampler.sample(logits, [row]).token_ids[0]))
        grammar.accept(tokens[-1])
    return tokens[:-1] if tokens[-1] in stop_ids else tokens


@pytest.mark.parametrize("name", COMPILERS)
def test_noise_under_a_json_schema_follows_the_schema(name: str) -> None:
    for seed in range(5):
        answer = json.loads(TOKENIZERS[name].decode(write(name, JSON_SCHEMA, seed)))
        jsonschema.validate(answer, SCHEMA)


@pytest.mark.parametrize("name", COMPILERS)
def test_noise_under_json_object_is_an_object(name: str) -> None:
    for seed in range(5):
        answer = json.loads(TOKENIZERS[name].decode(write(name, {"type": "json_object"}, seed)))
        assert isinstance(answer, dict)


@pytest.mark.parametrize("name", COMPILERS)
@pytest.mark.parametrize(
    ("pattern", "ends_by_itself"),
    [
        ("(red|green) [0-9]{2,3}", True),
        ("^a$", True),
        ("call me [A-Za-z]{1,10}", True),
        ("[^x]{3}", True),
        ("(é|日本)+!?", False),
        ("", False),
    ],
)
def test_noise_under_an_expression_matches_it(
    pattern: str, ends_by_itself: bool, name: str
) -> None:
    for seed in range(5):
        for ignore_eos in {False, ends_by_itself}:
            tokens = write(name, regex(pattern), seed, ignore_eos=ignore_eos)
            assert re.fullmatch(pattern, TOKENIZERS[name].decode(tokens), re.DOTALL)


def test_no_special_token_can_stand_in_a_string() -> None:
    grammar = start(regex("(.|\n)*"))
    special = {BYTES.convert_tokens_to_ids(token) for token in (IMAGE, PLAIN_ROLE, "<|im_start|>")}
    padding = set(range(len(BYTES), len(BYTES) + PADDED))
    assert not allowed(grammar) & (special | padding)
    assert allowed(grammar) >= {*ids("a<é")[:-1], BYTES.eos_token_id}


def test_stop_tokens_of_the_request_may_come_once_the_answer_is_complete() -> None:
    end, own = BYTES.eos_token_id, BYTES.convert_tokens_to_ids("<|im_start|>")
    grammar = start(regex("ab*"), stop_ids=[end, own])
    assert allowed(grammar) == set(ids("a"))
    grammar.accept(ids("a")[0])
    assert not grammar.finished
    assert allowed(grammar) == {*ids("b"), end, own}
    grammar.accept(own)
    assert grammar.finished


def test_it_is_finished_when_nothing_more_can_come() -> None:
    grammar = start(regex("ab"), stop_ids=[])
    for token in ids("ab"):
        assert not grammar.finished
        grammar.accept(token)
    assert grammar.finished


def test_a_grammar_goes_on_where_the_generated_tokens_end() -> None:
    compiled = COMPILERS["bytes"].compile(JSON_SCHEMA)
    assert compiled is not None
    stop_ids = [BYTES.eos_token_id]
    going = compiled.start(stop_ids)
    tokens = write("bytes", JSON_SCHEMA, seed=1)
    for count, token in enumerate(tokens):
        again = compiled.start(stop_ids, tokens[:count])
        assert torch.equal(again.bitmask(), going.bitmask())
        going.accept(token)


def test_answers_of_one_grammar_do_not_touch_each_other() -> None:
    first, second = start(regex("ab")), start(regex("ab"))
    first.accept(ids("a")[0])
    assert allowed(second) == set(ids("a"))


def test_a_token_against_the_grammar_is_an_error() -> None:
    with pytest.raises(EngineError, match="does not allow"):
        start(regex("ab")).accept(ids("b")[0])


def test_the_bitmask_has_a_bit_for_every_column_of_the_logits() -> None:
    assert start(regex("a")).bitmask().shape == ((len(BYTES) + PADDED + 31) // 32,)
    fewer = GrammarCompiler(BYTES, len(BYTES) - 100, [BYTES.eos_token_id])
    compiled = fewer.compile(regex("[a-z]"))
    assert compiled is not None
    assert compiled.start([]).bitmask().shape == ((len(BYTES) - 100 + 31) // 32,)


def test_text_means_no_grammar() -> None:
    assert COMPILERS["bytes"].compile(None) is None
    assert COMPILERS["bytes"].compile({"type": "text"}) is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


REFUSED = {
    "no schema at all": {"type": "json_schema"},
    "no schema in its place": {"type": "json_schema", "json_schema": {"name": "x"}},
    "a misspelt field": {"type": "json_schema", "json_schema": {"schema": {}, "shcema": {}}},
    "a field of another kind": {"type": "json_object", "json_schema": {}},
    "no expression": {"type": "regex_schema"},
    "a string that is no JSON": {"type": "json_schema", "json_schema": "{nonsense"},
    "an open group": regex("(a"),
    "look-ahead": regex("(?=a)b"),
    "a back-reference": regex(r"(a)\1"),
    "an expression that nothing matches": regex(r"[^\s\S]"),
    "half a character": regex("\ud800"),
    "a long expression": regex("a" * 70_000),
    "a deep expression": regex("(" * 20_000 + ")" * 20_000),
    "a schema that nothing fits": schema(False),
    "a schema that is itself": schema({"$ref": "#"}),
    "a reference to nothing": schema({"$ref": "#/$defs/nothing"}),
    "a reference to elsewhere": schema({"$ref": "http://localhost/schema"}),
    "an unknown type": schema({"type": "strin"}),
    "a keyword that cannot be followed": schema({"type": "array", "uniqueItems": True}),
    "a contradiction": schema({"allOf": [{"type": "integer"}, {"type": "string"}]}),
    "an empty range": schema({"type": "integer", "minimum": 3, "maximum": 1}),
    "an invalid pattern": schema({"type": "string", "pattern": "(("}),
    "a huge length": schema({"type": "string", "minLength": 2**70}),
    "half a character in a schema": schema({"const": "\ud800"}),
    "a large schema": schema({"enum": ["a" * 40_000, "b" * 40_000]}),
    "a deep schema": schema(nested(400)),
    "a very deep schema": schema(nested(20_000)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_formats_that_cannot_be_followed_are_refused_by_name(what: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        COMPILERS["bytes"].compile(REFUSED[what])
    assert refused.value.param == "gen_config.response_format"
    assert len(refused.value.message) < 500


def test_unknown_kinds_are_not_supported() -> None:
    with pytest.raises(UnsupportedParameter, match="json_schema, json_object, regex_schema"):
        COMPILERS["bytes"].compile({"type": "lark"})


def test_a_tokenizer_without_bytes_is_not_supported() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, END: 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END)
    with pytest.raises(UnsupportedParameter, match="does not support `response_format`"):
        GrammarCompiler(tokenizer, 3, [1]).compile(regex("a"))


def test_a_grammar_that_explodes_ends_its_request_and_nothing_else() -> None:
    # A set of states for each place of the a: 2 ** 40 of them in the end.
    compiled = COMPILERS["bytes"].compile(regex(".*a.{40}"))
    assert compiled is not None
    grammar = compiled.start([])
    letters = random.Random(1)

    def write_on() -> None:
        for _ in range(20_000):
            grammar.bitmask()
            grammar.accept(ids(letters.choice("ab"))[0])

    with pytest.raises(InvalidRequest, match="too complex") as refused:
        write_on()
    assert refused.value.param == "gen_config.response_format"
    assert allowed(compiled.start([])) >= set(ids("ab"))
