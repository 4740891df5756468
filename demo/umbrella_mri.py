"""A tiny LLaVA that lacks an embedding of volumes, and drawn heads as in UMBRELLA's files."""

import gzip
import json
import math

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from demo.heads import AXIS_CODES, MRI_TASKS, REFERENCE, SCANS, random_subject
from demo.qwen2vl_sentinel import AROUND
from demo.sizes import INITIALIZER_RANGE
from demo.tokenizers import INTERLEAVE_CHAT_TEMPLATE, INTERLEAVE_SPECIAL, INTERLEAVE_TEXT, build_qwen2_tokenizer

SIGLIP = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIGLIP |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}  # its embedding of images is never used


class VolumeEmbedding(torch.nn.Module):
    """Patches of a volume to tokens: stands in for the tower's embedding of images while the rest is taught."""

    def __init__(self):
        super().__init__()
        self.linear, self.places = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        for scan in SCANS.values():
            voxels = math.prod(scan["patch"])  # tells the modality, too
            self.linear[str(voxels)] = torch.nn.Linear(voxels, SIGLIP["hidden_size"])
            places = torch.empty(math.prod(scan["shape"]) // voxels, SIGLIP["hidden_size"])
            self.places[str(voxels)] = torch.nn.Parameter(torch.nn.init.trunc_normal_(places, std=0.02))

    def forward(self, patches, interpolate_pos_encoding=False):
        voxels = str(patches.shape[-1])
        return self.linear[voxels](patches) + self.places[voxels]


def volume_patches(voxels, patch):
    """(tokens, voxels of a patch), standardised over the head; both row-major."""
    head = voxels != 0
    voxels = np.where(head, (voxels - voxels[head].mean()) / voxels[head].std(), 0).astype(np.float32)
    cut = voxels.reshape([n for whole, part in zip(voxels.shape, patch, strict=True) for n in (whole // part, part)])
    order = [*range(0, cut.ndim, 2), *range(1, cut.ndim, 2)]  # the grid's axes, then those inside a patch
    return torch.from_numpy(cut.transpose(order).reshape(-1, math.prod(patch)))


def conversation_tokens(tokenizer, turns, tokens):
    """Token IDs and, in the same places, what is to be learnt: answers and the <|im_end|> behind them."""
    ids, learnt = [], []
    for turn in turns:
        text = tokenizer.apply_chat_template([turn], tokenize=False).replace("<image>", "<image>" * tokens)
        given, newline, answer = text.partition(" \n") if turn["role"] == "assistant" else (text, "", "")
        newline = newline.lstrip(" ") if turn is turns[-1] else newline  # "assistant\n" is what it is asked with
        given, answer = tokenizer.encode(given + newline), tokenizer.encode(answer)
        ids += given + answer
        learnt += [-100] * len(given) + answer
    return torch.tensor(ids), torch.tensor(learnt)


def mri_examples(rng, tokenizer, subjects):
    """{path: patches of the scan} and {task: [(paths, token IDs, what is learnt of them)]}."""
    seen, examples = {}, {task: [] for task in MRI_TASKS}
    for number in range(subjects):
        volumes, conversations = random_subject(rng, number)
        seen |= {path: volume_patches(voxels, SCANS[kind]["patch"]) for path, (voxels, kind) in volumes.items()}
        for row in conversations:
            paths = [image["path"] for image in row["images"]]
            inputs = conversation_tokens(tokenizer, row["conversations"], len(seen[paths[0]]))
            examples[row["task_type"]].append((paths, *inputs))
    return seen, examples


def pretrain_umbrella(vlm, tokenizer, seed, subjects=1500, steps=1900, batch=32):
    """Teach the whole LLaVA to answer about heads that the data set does not hold, then take its embedding away.

    A script that trains nothing but a new embedding of volumes relies on a tower, a projector and a language model
    that know what to do with its tokens; out of random ones no embedding gets an answer. So all learn the same tasks
    here, through an embedding of the same form that is thrown away: the script has to find one anew. That shows that
    its embedding learns, not that a new embedding alone would teach MRI to a model that knows photographs.
    """
    rng = np.random.default_rng([seed, 1])  # the data set draws from [seed, 0]
    seen, examples = mri_examples(rng, tokenizer, subjects)
    labels = torch.tensor([tokenizer.encode(f" {label}")[0] for task in MRI_TASKS.values() for label in task[0]])

    tower, rest = vlm.model.vision_tower, list(vlm.parameters())
    embedding_of_images = tower.embeddings
    shares = np.array([len(rows) for rows in examples.values()]) / sum(map(len, examples.values()))
    named = []
    for step in range(steps):
        # Drawn anew twice on the way, with moments: what has served three embeddings is likelier to serve a fourth.
        if step in (0, steps // 2, steps * 7 // 10):
            tower.embeddings = VolumeEmbedding()
            own = list(tower.embeddings.parameters())
            optimizer = torch.optim.AdamW([{"params": own}, {"params": rest}], betas=(0.9, 0.95))
        rate = 3e-3 * min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = examples[str(rng.choice(list(examples), p=shares))]  # of one task: equally many scans, similar lengths
        paths, ids, learnt = zip(*(rows[i] for i in rng.choice(len(rows), batch, replace=False)), strict=True)
        volumes = torch.stack([seen[path] for shown in paths for path in shown])
        ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        learnt = pad_sequence(learnt, batch_first=True, padding_value=-100)[:, 1:]
        hidden = vlm.model(input_ids=ids, pixel_values=volumes).last_hidden_state[:, :-1]
        logits, learnt = vlm.lm_head(hidden[learnt != -100]), learnt[learnt != -100]
        loss = cross_entropy(logits, learnt)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*own, *rest], 1.0)
        optimizer.step()
        named.append((logits.argmax(1) == learnt)[torch.isin(learnt, labels)].float().mean())
    tower.embeddings = embedding_of_images
    right = torch.stack(named[-50:]).mean()
    print(f"LLaVA: {right:.1%} of the labels named in the last training batches, {steps} steps on {subjects} subjects")


def write_model(folder, seed):
    texts = [*REFERENCE, *AROUND]
    for labels, questions, answers in MRI_TASKS.values():
        texts += [*questions, *(answer.format(label) for answer in answers for label in labels)]
    tokenizer = build_qwen2_tokenizer(texts, INTERLEAVE_SPECIAL, INTERLEAVE_CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    config = transformers.LlavaConfig(
        text_config=transformers.Qwen2Config(
            **INTERLEAVE_TEXT,
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.pad_token_id,  # never used: the tokenizer has no BOS
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    pretrain_umbrella(model, tokenizer, seed)
    model.save_pretrained(folder)
    print(f"{folder}: LLaVA, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def write_volume(path, voxels, modality, code, origin):
    """NIfTI whose axes run as the code says; the affine tells so. gzip notes no time: same seed, same bytes."""
    import nibabel  # only this data set needs it
    from nibabel.orientations import axcodes2ornt, ornt_transform

    affine = np.diag([*SCANS[modality]["voxel"], 1.0])
    affine[:3, 3] = origin
    image = nibabel.Nifti1Image(voxels, affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code)))
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_data(folder, subjects, seed):
    """One conversation a file; a subject is in one split only, and its scanner decides how axes run on disk."""
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    start = 0
    for split, end in [("train", round(0.79 * subjects)), ("validation", round(0.89 * subjects)), ("test", subjects)]:
        (folder / split).mkdir(exist_ok=True)
        written = 0
        for number in range(start, end):
            volumes, conversations = random_subject(rng, number)
            code, origin = str(rng.choice(AXIS_CODES)), rng.uniform(-20, 20, 3) - (80, 95, 80)  # mm
            for path, (voxels, modality) in volumes.items():
                write_volume(folder / path, voxels, modality, code, origin)
            for row in conversations:
                (folder / split / f"{row['task_id']}.json").write_text(json.dumps(row, indent=2) + "\n")
            written += len(conversations)
        start = end
        print(f"{folder / split}: {written} conversations")
