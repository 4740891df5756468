"""Token IDs are read from the checkpoint; the recipe that computes them fails here as it does in the field."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

from common import (
    IGNORE,
    grow_embeddings,
    image_token_id,
    register_placeholder,
    reserve_placeholder,
    separate_pad_from_eos,
    single_token_id,
)


@pytest.fixture
def tokenizer(demo_folder):
    """600 word pieces; <image> is not among them; no PAD."""
    return AutoTokenizer.from_pretrained(demo_folder / "model")


@pytest.fixture(scope="module")
def llava(demo_folder):
    return LlavaForConditionalGeneration.from_pretrained(demo_folder / "model")


# --- the image token -------------------------------------------------------------------------------------------


def test_image_token_id_is_read_not_computed():
    text = {"model_type": "mistral", "vocab_size": 32064}
    assert image_token_id(LlavaConfig(image_token_index=31000, text_config=text)) == 31000
    assert image_token_id(PreTrainedConfig(image_token_index=7, vocab_size=10)) == 7
    assert image_token_id(PreTrainedConfig(image_token_id=7, vocab_size=10)) == 7
    assert image_token_id(PreTrainedConfig(image_token_index=7, image_token_id=7, vocab_size=10)) == 7
    assert image_token_id(PreTrainedConfig(image_token_index=0, vocab_size=10)) == 0


def test_image_token_id_refuses_a_configuration_without_one():
    for config in (MistralConfig(), PreTrainedConfig(image_token_index=None, vocab_size=10)):
        with pytest.raises(ValueError, match=r"names no image token; copy image_token_index"):
            image_token_id(config)


def test_image_token_id_refuses_two_different_ones():
    with pytest.raises(ValueError, match=r"two different image tokens: \[32000, 32001\]"):
        image_token_id(PreTrainedConfig(image_token_index=32000, image_token_id=32001, vocab_size=32064))


@pytest.mark.parametrize("token_id", [-1, 32000, 32001])
def test_image_token_id_refuses_one_outside_the_embedding(token_id):
    with pytest.raises(ValueError, match=rf"image token ID {token_id} is outside the embedding of 32000 rows"):
        image_token_id(LlavaConfig(image_token_index=token_id, text_config={"vocab_size": 32000}))
    assert image_token_id(LlavaConfig(image_token_index=31999, text_config={"vocab_size": 32000})) == 31999


def test_vocab_size_minus_one_gives_tokens_0_and_the_id_that_is_read_runs(llava):
    config = llava.config
    pixel_values = torch.zeros(1, 3, 72, 72)

    def forward(image_id):
        return llava(input_ids=torch.tensor([[1, *[image_id] * 64, 5]]), pixel_values=pixel_values)

    with pytest.raises(ValueError, match=r"Image features and image tokens do not match, tokens: 0"):
        forward(config.text_config.vocab_size - 1)
    assert forward(image_token_id(config)).logits.shape == (1, 66, 640)


def test_searching_for_the_pieces_of_the_placeholder_misses_it_after_a_newline(tokenizer):
    pieces = tokenizer.encode("<image>", add_special_tokens=False)
    ids = tokenizer.encode("x\n<image>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(pieces) == ["▁<", "i", "ma", "ge", ">"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "x", "<0x0A>", "<", "i", "ma", "ge", ">"]
    assert not any(ids[i : i + len(pieces)] == pieces for i in range(len(ids)))

    assert register_placeholder(tokenizer, "<image>", 600) == 600
    assert tokenizer.encode("<image>", add_special_tokens=False) == [600]
    ids = tokenizer.encode("x\n<image>\n<image>yes", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "x", "<0x0A>", "<image>", "<0x0A>", "<image>", "y", "es"]


def test_register_placeholder_refuses_the_id_of_a_word_piece(tokenizer):
    piece = tokenizer.convert_ids_to_tokens(599)
    with pytest.raises(ValueError) as raised:
        register_placeholder(tokenizer, "<image>", 599)
    assert str(raised.value) == f"config.json gives <image> the ID 599, but that ID is the word piece {piece!r}"
    assert len(tokenizer) == 600


def test_register_placeholder_refuses_another_id_than_the_tokenizer_s(tokenizer):
    register_placeholder(tokenizer, "<image>", 600)
    for token_id in (599, 601):
        with pytest.raises(ValueError, match=f"the ID {token_id}, but the tokenizer has it as 600"):
            register_placeholder(tokenizer, "<image>", token_id)


def test_register_placeholder_fills_the_ids_between(tokenizer):
    register_placeholder(tokenizer, "<image>", 603)
    assert tokenizer.convert_ids_to_tokens([600, 601, 602, 603]) == [
        *["<|unused_600|>", "<|unused_601|>", "<|unused_602|>"],
        "<image>",
    ]
    assert single_token_id(tokenizer, "<image>") == 603


def test_register_placeholder_twice_is_as_once(tokenizer):
    register_placeholder(tokenizer, "<image>", 600)
    register_placeholder(tokenizer, "<image>", 600)
    assert len(tokenizer) == 601
    assert tokenizer.encode("<image>", add_special_tokens=False) == [600]


def test_single_token_id_names_the_pieces_of_what_is_not_one(tokenizer):
    assert single_token_id(tokenizer, "</s>") == 2
    with pytest.raises(ValueError) as raised:
        single_token_id(tokenizer, "<image>")
    pieces = ["▁<", "i", "ma", "ge", ">"]
    assert str(raised.value) == f"'<image>' is not one token of this tokenizer but 5: {pieces}"


AUDIO = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]


def test_placeholders_are_reserved_in_rows_that_the_embedding_has_to_spare(tokenizer, demo_folder):
    config = AutoConfig.from_pretrained(demo_folder / "model")  # an embedding of 640 rows for 600 word pieces
    assert reserve_placeholder(tokenizer, AUDIO, config, None) == 601
    assert tokenizer.encode("<|audio_bos|><|AUDIO|><|audio_eos|>", add_special_tokens=False) == [600, 601, 602]
    assert reserve_placeholder(tokenizer, AUDIO, config, 601) == 601  # once more, and of a checkpoint that names it
    with pytest.raises(ValueError, match=r"the placeholder has the ID 599, but the tokenizer has <\|AUDIO\|> as 601"):
        reserve_placeholder(tokenizer, AUDIO, config, 599)


def test_an_embedding_never_grows_for_reserved_placeholders(tokenizer):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=602))
    with pytest.raises(ValueError, match=r"the embedding of 602 rows has no room for .* \(IDs \[600, 601, 602\]\)"):
        reserve_placeholder(tokenizer, AUDIO, config, None)


@pytest.mark.parametrize("tied", [False, True])
def test_grown_rows_are_the_mean_of_the_others_and_the_same_each_time(tied):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    lm = MistralForCausalLM(MistralConfig(vocab_size=10, num_key_value_heads=1, tie_word_embeddings=tied, **size))
    before = [module.weight.clone() for module in (lm.get_input_embeddings(), lm.get_output_embeddings())]
    for seed in (1, 2):
        torch.manual_seed(seed)
        grow_embeddings(lm, 10 + seed)
        for module, old in zip((lm.get_input_embeddings(), lm.get_output_embeddings()), before, strict=True):
            assert module.weight.shape == (10 + seed, 8)
            assert torch.equal(module.weight[:10], old)
            torch.testing.assert_close(module.weight[10:], old.mean(0).expand(seed, 8))
    grow_embeddings(lm, 5)  # never fewer
    assert lm.get_input_embeddings().weight.shape == (12, 8)


# --- PAD and EOS -----------------------------------------------------------------------------------------------


def test_a_missing_pad_is_added(tokenizer):
    line = separate_pad_from_eos(tokenizer)
    assert line == "PAD None (None), EOS '</s>' (2): PAD is now '<|pad|>' (600)"
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|pad|>", 600, 601)
    assert separate_pad_from_eos(tokenizer) == "PAD '<|pad|>' (600), EOS '</s>' (2): distinct"
    assert len(tokenizer) == 601


def test_pad_equal_to_eos_masks_eos_and_is_separated(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token

    def without_pad():  # as padded batches are masked
        labels = torch.tensor([IGNORE, 5, tokenizer.eos_token_id, tokenizer.pad_token_id])
        return labels.masked_fill(labels == tokenizer.pad_token_id, IGNORE).tolist()

    assert without_pad() == [IGNORE, 5, IGNORE, IGNORE]  # an answer that never ends
    assert separate_pad_from_eos(tokenizer) == "PAD '</s>' (2), EOS '</s>' (2): PAD is now '<|pad|>' (600)"
    assert without_pad() == [IGNORE, 5, 2, IGNORE]
    assert tokenizer.eos_token_id == 2


def test_a_pad_of_its_own_stays(tokenizer):
    tokenizer.pad_token = "<unk>"
    assert separate_pad_from_eos(tokenizer) == "PAD '<unk>' (0), EOS '</s>' (2): distinct"
    assert (tokenizer.pad_token_id, len(tokenizer)) == (0, 600)


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        separate_pad_from_eos(tokenizer)


@pytest.mark.parametrize("image_id", [600, 638, 639, 645])
def test_a_padded_embedding_only_ever_grows(tokenizer, demo_folder, image_id):
    model = LlavaForConditionalGeneration.from_pretrained(demo_folder / "model")
    before = model.get_input_embeddings().weight.clone()
    assert before.shape == (640, 128)
    register_placeholder(tokenizer, "<image>", image_id)
    line = separate_pad_from_eos(tokenizer, model)
    pad = image_id + 1
    rows = max(640, pad + 1)
    grown = f", embedding grown to {rows} rows" if rows > 640 else ""
    assert line == f"PAD None (None), EOS '</s>' (2): PAD is now '<|pad|>' ({pad}){grown}"
    assert model.get_input_embeddings().weight.shape == (rows, 128)
    assert model.get_output_embeddings().weight.shape == (rows, 128)
    assert model.config.text_config.vocab_size == rows
    assert torch.equal(model.get_input_embeddings().weight[:640], before)
    configs = (model.config, model.config.text_config, model.generation_config)
    assert [config.pad_token_id for config in configs] == [pad, pad, pad]
