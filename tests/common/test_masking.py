"""Supervised are the answer and its EOS, exactly, whatever the tokenizer does at the answer's edges; and the token IDs
are those of transformers' own processor."""

import copy
import random

import pytest
import torch
from helpers import load_demo
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

from common import IGNORE, encode_supervised, expand_placeholder, put_features
from inputs import images
from inputs.building import check_example

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def bytes_bpe():
    """A byte-level BPE as Qwen's: ">" is merged with the letter or bracket after it, "]" with "</"."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    texts = ["ANS "] * 50 + ["ink "] * 40 + [">P"] * 30 + [">("] * 20 + ["]</"] * 10 + [" pink"] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=5, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentencepiece(kind: str):
    """A SentencePiece-like BPE with a dummy space before all parts of a text ("always"), before the first alone, or,
    as the files of older Llama and Mistral tokenizers have it, from a normaliser that does not look whether a space
    stands there already."""
    merges = ["▁ ▁", "▁ l", "▁l e", "f t", "▁le ft", "l e", "le ft", "▁ [", "▁ q"]
    merges = [tuple(merge.split()) for merge in merges]
    pieces = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "▁", "\n", *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def encoded(tokenizer, text, **options) -> list[str]:
    """The pieces, each supervised one marked by a star."""
    input_ids, labels = encode_supervised(tokenizer, text, **options)
    assert all(label in (IGNORE, token) for token, label in zip(input_ids, labels, strict=True))
    pieces = tokenizer.convert_ids_to_tokens(input_ids)
    return [piece + "*" * (label != IGNORE) for piece, label in zip(pieces, labels, strict=True)]


def searched(tokenizer, text) -> list[int] | None:
    """The original recipe: encode everything, then search for the sentinels' own pieces. None: not found."""

    def find(part, start):
        return next((i for i in range(start, len(ids)) if ids[i : i + len(part)] == part), None)

    ids = tokenizer.encode(text, add_special_tokens=False)
    opening, closing = (tokenizer.encode(s, add_special_tokens=False) for s in ("<ANS>", "</ANS>"))
    start = find(opening, 0)
    end = None if start is None else find(closing, start)
    return None if end is None else ids[start + len(opening) : end]


# --- byte-level BPE --------------------------------------------------------------------------------------------


def test_the_tokenizer_here_merges_sentinels_as_qwen_does(bytes_bpe):
    assert bytes_bpe.tokenize("<ANS>Pink") == ["<", "ANS", ">P", "ink"]
    assert bytes_bpe.tokenize("<ANS>(a)") == ["<", "ANS", ">(", "a", ")"]
    assert bytes_bpe.tokenize("[1]</ANS>") == ["[", "1", "]</", "ANS", ">"]


def test_pink_is_supervised_where_the_search_for_the_sentinel_finds_nothing(bytes_bpe):
    text = "color\n<ANS>{}</ANS><|im_end|>\n"
    assert bytes_bpe.decode(searched(bytes_bpe, text.format("pink"))) == "pink"  # the original works for lower case
    assert searched(bytes_bpe, text.format("Pink")) is None
    assert searched(bytes_bpe, text.format("(a)")) is None
    assert searched(bytes_bpe, text.format("[1]")) is None
    expected = ["c", "o", "l", "o", "r", "Ċ", "P*", "ink*", "<|im_end|>*", "Ċ"]
    assert encoded(bytes_bpe, text.format("Pink")) == expected


def test_kept_sentinels_become_their_ordinary_pieces_and_are_not_supervised(bytes_bpe):
    assert encoded(bytes_bpe, "Q\n<ANS>Pink</ANS><|im_end|>", keep_sentinels=True) == [
        *["Q", "Ċ", "<", "ANS", ">"],
        *["P*", "ink*"],
        *["</", "ANS", ">", "<|im_end|>*"],
    ]


def test_no_merge_crosses_an_edge_of_the_answer(bytes_bpe):
    assert bytes_bpe.tokenize(">P]</ANS>") == [">P", "]</", "ANS", ">"]
    assert encoded(bytes_bpe, "><ANS>P]</ANS><|im_end|></") == [">", "P*", "]*", "<|im_end|>*", "</"]


def test_eos_elsewhere_is_not_supervised(bytes_bpe):
    text = "a<|im_end|>Q\n<ANS>1</ANS><|im_end|><|im_end|>"
    assert encoded(bytes_bpe, text) == ["a", "<|im_end|>", "Q", "Ċ", "1*", "<|im_end|>*", "<|im_end|>"]


ONE = "one answer must stand between <ANS> and </ANS>"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Q pink<|im_end|>", f"{ONE}; there are [] in 'Q pink<|im_end|>'"),
        ("Q<ANS>pink<|im_end|>", f"{ONE}; there are ['<ANS>'] in"),
        ("Q pink</ANS><|im_end|>", f"{ONE}; there are ['</ANS>'] in"),
        ("Q</ANS>pink<ANS><|im_end|>", f"{ONE}; there are ['</ANS>', '<ANS>'] in"),
        ("Q<ANS>a<ANS>b</ANS><|im_end|>", f"{ONE}; there are ['<ANS>', '<ANS>', '</ANS>'] in"),
        ("Q<ANS>a</ANS><|im_end|>R<ANS>b</ANS><|im_end|>", f"{ONE}; there are {['<ANS>', '</ANS>'] * 2} in"),
        ("Q<ANS>pink</ANS><ANS>b</ANS><|im_end|>", f"{ONE}; there are {['<ANS>', '</ANS>'] * 2} in"),
        ("Q<ANS>pink</ANS></ANS><|im_end|>", f"{ONE}; there are ['<ANS>', '</ANS>', '</ANS>'] in"),
        ("Q<ANS></ANS><|im_end|>", "empty answer in"),
        ("Q<ANS>pink</ANS>", "no EOS ('<|im_end|>') directly after the answer in"),
        ("Q<ANS>pink</ANS> <|im_end|>", "no EOS ('<|im_end|>') directly after the answer in"),
        ("Q<ANS>pink</ANS>\n", "no EOS ('<|im_end|>') directly after the answer in"),
    ],
)
def test_a_text_whose_answer_is_not_plain_is_an_error(bytes_bpe, text, error):
    for keep_sentinels in (False, True):
        with pytest.raises(ValueError) as raised:
            encode_supervised(bytes_bpe, text, keep_sentinels=keep_sentinels)
        assert str(raised.value).startswith(error)


def test_encoding_leaves_the_tokenizer_as_it_was(bytes_bpe):
    before = len(bytes_bpe), bytes_bpe.tokenize("<ANS>Pink</ANS>")
    encode_supervised(bytes_bpe, "Q<ANS>Pink</ANS><|im_end|>")
    assert (len(bytes_bpe), bytes_bpe.tokenize("<ANS>Pink</ANS>")) == before


@pytest.mark.parametrize("keep_sentinels", [False, True])
def test_a_tokenizer_that_grew_is_split_anew(bytes_bpe, keep_sentinels):
    text, growing = "Q<extra><ANS>1</ANS><|im_end|>", copy.deepcopy(bytes_bpe)
    assert encoded(growing, text, keep_sentinels=keep_sentinels)[:2] == ["Q", "<"]
    growing.add_tokens(["<extra>"])
    pieces = encoded(growing, text, keep_sentinels=keep_sentinels)
    assert pieces[:2] == ["Q", "<extra>"] and [p for p in pieces if p.endswith("*")] == ["1*", "<|im_end|>*"]
    assert keep_sentinels or len(pieces) == 4


def random_answer(number: int) -> str:
    draw = random.Random(number)
    parts = ["Pink", "pink", "A", "ZZ", "7", "5-10mm", "<5mm", ">20", "(a)", "[mass]", "{", "}", '"', "'s", "/", "\\"]
    parts += ["é", "Ödem", "ñ", "息肉", "ポリープ", "🩺", "👩‍⚕️", "ANS", "</ANS", "<ANS", "ANS>"]
    parts += ["<", ">", "\n", "  ", " ", "\t"]
    answer = "".join(draw.choice(parts) for _ in range(draw.randint(1, 6)))
    return draw.choice(["", "", " "]) + answer + draw.choice(["", "", " "])


@pytest.mark.parametrize("keep_sentinels", [False, True])
def test_any_answer_is_supervised_character_for_character(bytes_bpe, keep_sentinels):
    answers = [random_answer(number) for number in range(2100)]
    answers = [a for a in answers if "<ANS>" not in a and "</ANS>" not in a]  # refused before they get here
    assert len(answers) >= 2000
    for answer in answers:
        text = f"<|endoftext|>Q: {answer[::-1]}?\n<ANS>{answer}</ANS><|im_end|>\nmore"
        _, labels = encode_supervised(bytes_bpe, text, keep_sentinels=keep_sentinels)
        supervised = [label for label in labels if label != IGNORE]
        assert bytes_bpe.decode(supervised) == answer + "<|im_end|>"


# --- SentencePiece ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["always", "first"])
def test_sentencepiece_answer_has_its_usual_pieces(kind):
    text = "[X]<ANS> left</ANS></s> q"
    tokenizer = sentencepiece(kind)
    assert encoded(tokenizer, text) == ["▁[", "X", "]", "▁left*", "</s>*", "▁q"]
    assert encoded(tokenizer, text, keep_sentinels=True) == [
        *["▁[", "X", "]", "▁", "<", "A", "N", "S", ">"],
        *["▁left*", "▁", "<", "/", "A", "N", "S", ">", "</s>*", "▁q"],
    ]


@pytest.mark.parametrize("kind", ["always", "first", "normalizer"])
@pytest.mark.parametrize(
    "text", ["[X]<ANS> left</ANS></s>", "[X]<ANS>left</ANS></s>", "[X]<ANS> left left</ANS></s> q"]
)
def test_sentencepiece_ids_equal_those_of_the_text_without_sentinels(kind, text):
    tokenizer = sentencepiece(kind)
    plain = tokenizer.tokenize(text.replace("<ANS>", "").replace("</ANS>", ""))
    assert [piece.rstrip("*") for piece in encoded(tokenizer, text)] == plain


@pytest.mark.parametrize("kind", ["always", "first", "normalizer", "bytes"])
def test_the_supervised_part_ends_where_the_text_with_its_answer_does(kind, bytes_bpe):
    tokenizer = bytes_bpe if kind == "bytes" else sentencepiece(kind)
    for number in range(100):
        answer = random_answer(number)
        if "<ANS>" in answer or "</ANS>" in answer or (kind != "bytes" and not answer.isascii()):
            continue
        for after in ("", " q", tokenizer.eos_token):  # a text may end with a second EOS
            text = f"[X] {number}<ANS>{answer}</ANS>{tokenizer.eos_token}{after}"
            input_ids, labels = encode_supervised(tokenizer, text)
            answered = tokenizer.encode(f"[X] {number}{answer}", add_special_tokens=False)
            end = max(i for i, label in enumerate(labels) if label != IGNORE)
            assert input_ids[end] == tokenizer.eos_token_id
            asked = tokenizer.encode(f"[X] {number}", add_special_tokens=False)
            if answered[: len(asked)] == asked and answered != asked:  # no merge crosses where the answer begins
                assert input_ids[:end] == answered and labels.count(IGNORE) == len(input_ids) - (end + 1 - len(asked))


# --- the same IDs as transformers' processor -------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_folder):
    return load_demo(demo_folder)


def test_ids_equal_those_of_transformers_processor(demo):
    task = demo.task
    config = LlavaConfig.from_pretrained(demo.folder / "model")
    processor = LlavaProcessor(
        task.processor,
        task.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
    )
    answers = set()
    for example in demo.examples[:60:3]:
        image = images.open_image(demo.folder / "data", example.media[0])
        prompt = f"[INST] <image>\n{example.question} [/INST]"
        prefix, input_ids, labels = task.encode(example, example.answer)
        answer = next(i for i, label in enumerate(labels) if label != IGNORE)
        assert prefix.count(task.image_id) == 64
        assert prefix + input_ids[:answer] == processor(images=image, text=prompt).input_ids[0]
        complete = processor(images=image, text=f"{prompt} {example.answer}</s>").input_ids[0]
        assert prefix + input_ids == complete
        assert labels == [IGNORE] * answer + input_ids[answer:]
        answers.add(example.answer)
    assert len(answers) > 5


def test_what_the_tokenizer_itself_puts_first_stands_there_once(demo):
    tokenizer = demo.task.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("yes").input_ids) == ["<s>", "▁yes"]
    for begun in ("", "<s>"):
        assert encoded(tokenizer, begun + "yes<ANS> no</ANS></s>")[:2] in (["<s>", "▁yes"], ["<s>", "y"])


def test_the_checkpoint_s_own_examples_supervise_answer_and_eos(demo):
    tokenizer = demo.task.tokenizer
    for example in demo.examples:
        _, input_ids, labels = demo.task.encode(example, example.answer)
        supervised = [label for label in labels if label != IGNORE]
        assert supervised == [*tokenizer.encode(example.answer, add_special_tokens=False), 2]
        assert input_ids[-len(supervised) :] == supervised


# --- the check of every example --------------------------------------------------------------------------------


def parts(demo):
    """An example with its prefix, the branch's tokens and labels, and where its answer begins."""
    example = demo.examples[0]
    prefix, input_ids, labels = demo.task.encode(example, example.answer)
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    return example, prefix, input_ids, labels, start


def test_exactly_the_answer_and_its_eos_must_be_supervised(demo):
    example, prefix, input_ids, labels, start = parts(demo)
    check_example(example, demo.task, prefix, input_ids, labels)
    for wrong in (
        [*labels[:-1], IGNORE],  # the EOS is not
        [*labels[:start], IGNORE, *labels[start + 1 :]],  # the answer's first token is not
        labels[: start - 1] + input_ids[start - 1 : start] + labels[start:],  # the token before it is, too
        [IGNORE] * len(labels),
        input_ids,
    ):
        with pytest.raises(ValueError, match="supervised would be"):
            check_example(example, demo.task, prefix, input_ids, wrong)


def test_a_branch_that_begins_with_a_supervised_token_is_refused(demo):
    """The token before it may be another branch's."""
    example, prefix, input_ids, labels, start = parts(demo)
    with pytest.raises(ValueError, match="the branch's first token is supervised; begin it with prompt text"):
        check_example(example, demo.task, prefix + input_ids[:start], input_ids[start:], labels[start:])


def test_placeholders_must_be_as_many_as_features_and_none_after_them(demo):
    example, prefix, input_ids, labels, _ = parts(demo)
    image_id = demo.task.image_id
    with pytest.raises(ValueError, match=rf"64 features .* for 63 placeholders \(ID {image_id}\), and 0 after"):
        check_example(example, demo.task, prefix[:-1], input_ids, labels)
    with pytest.raises(ValueError, match=r"64 features of its media for 65 placeholders"):
        check_example(example, demo.task, [*prefix, image_id], input_ids, labels)
    with pytest.raises(ValueError, match=r"64 features of its media for 64 placeholders .* and 1 after these"):
        check_example(example, demo.task, prefix, [image_id, *input_ids[1:]], labels)


# --- placeholders ----------------------------------------------------------------------------------------------


def test_expand_placeholder_repeats_each_by_its_own_count():
    assert expand_placeholder([1, 9, 2, 9, 3], 9, [2, 3]) == [1, 9, 9, 2, 9, 9, 9, 3]
    assert expand_placeholder([1, 2], 9, []) == [1, 2]


@pytest.mark.parametrize("counts", [[], [2], [2, 2, 2]])
def test_expand_placeholder_refuses_another_number_of_media(counts):
    with pytest.raises(ValueError, match=f"2 placeholders of ID 9 for {len(counts)} media"):
        expand_placeholder([9, 1, 9], 9, counts)


def test_features_stand_at_the_placeholders_in_their_order():
    embeds, input_ids = torch.zeros(1, 6, 2), torch.tensor([[5, 9, 9, 6, 8, 9]])
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    placed = put_features(embeds, input_ids, 9, features)
    assert placed.tolist() == [[[0, 0], [1, 2], [3, 4], [0, 0], [0, 0], [5, 6]]]
    assert not embeds.any()  # a copy
    several = put_features(embeds, input_ids, torch.tensor([5, 8]), features[:2])
    assert several.tolist() == [[[1, 2], [0, 0], [0, 0], [0, 0], [3, 4], [0, 0]]]
    assert put_features(embeds.bfloat16(), input_ids, 9, features).dtype == torch.bfloat16


@pytest.mark.parametrize(("token_id", "features", "tokens"), [(9, 3, 2), (9, 1, 2), (8, 2, 0)])
def test_another_number_of_features_than_placeholders_is_refused_with_both(token_id, features, tokens):
    embeds, input_ids = torch.zeros(1, 4, 2), torch.tensor([[5, 9, 9, 6]])
    error = f"Image features and image tokens do not match, tokens: {tokens}, features: {features}"
    with pytest.raises(ValueError, match=error):
        put_features(embeds, input_ids, token_id, torch.ones(features, 2))
    with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
        put_features(embeds, input_ids, token_id, torch.ones(features, 2), "audio")
