"""Writes the models of this folder and what SentencePiece itself makes of some texts.

Not a test: run it by hand, with ``sentencepiece`` 0.2.3 installed, to make the folder anew.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent

MODELS = {
    "plain": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "prefix": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "trimmed": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
}

TEXTS = [
    *("", " ", "  ", "\n", "a", " a", "a ", "  two  spaces  ", "\n\n x\t", "\ttab"),
    *("Describe the picture.", "describe  the\npictures,  please", "12345 + 67 = 8.90", "aaaaaaa"),
    *("[UNUSED_TOKEN_9]", "<0x41>"),
    *("na\u00efve caf\u00e9", "\u4e66\u751f\u00b7\u4e07\u8c61 InternVL", "\U0001f600 smile"),
    *("<|im_start|>user\nHow many?<|im_end|>\n", "<img><IMG_CONTEXT></img>\nWhat is this?"),
]

USER_DEFINED = ["[UNUSED_TOKEN_0] x[UNUSED_TOKEN_2]y", "the[UNUSED_TOKEN_3]"]


def main() -> None:
    corpus = Path(__file__).parents[5].joinpath("README.md").read_text().split("\n")
    choice = random.Random(0)
    letters = "abcdeinorst  \n.,-*`(|)01\u00e9\u4e66\U0001f600"
    random_texts = ["".join(choice.choices(letters, k=choice.randrange(1, 30))) for _ in range(60)]
    pieces = [line[choice.randrange(20) :][: choice.randrange(60)] for line in corpus[:60]]
    expected = {}
    for name, options in MODELS.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=written,
            model_type="bpe",
            vocab_size=480,
            byte_fallback=True,
            normalization_rule_name="identity",
            user_defined_symbols=[f"[UNUSED_TOKEN_{index}]" for index in range(4)],
            minloglevel=2,
            **options,
        )
        (HERE / f"{name}.model").write_bytes(written.getvalue())
        model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
        expected[name] = []
        texts = [*TEXTS, *random_texts, *pieces]
        for text in texts + (USER_DEFINED if name == "plain" else []):
            ids = model.encode(text)
            expected[name].append([text, ids, model.decode(ids)])
    (HERE / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
