"""Heads: drawn MRI volumes in RAS (x grows to the subject's right, y to the front, z upwards), and conversations."""

import numpy as np

SCANS = {  # modality -> voxels along x, y, z (and time), their sizes in mm, and the patch that becomes one token
    "T1": {"shape": (32, 32, 32), "voxel": (5, 6, 5), "patch": (8, 8, 8)},  # 64 tokens
    "rsfMRI": {"shape": (24, 24, 24, 4), "voxel": (7, 8, 7), "patch": (8, 8, 8, 2)},  # 54 tokens
}
VENTRICLES = {"normal": 0.9, "enlarged": 1.5}  # how wide; they vary by a tenth, which leaves a gap
# How axes run on disk, from scanner to scanner: only a reader that turns them to RAS can tell left from right.
AXIS_CODES = ["RAS", "LAS", "LPS", "PSR", "RPI", "ASL"]
# task -> (labels, questions, answers with one label word each)
MRI_TASKS = {
    "ventricle_size": (
        ["normal", "enlarged"],
        ["Are the ventricles normal or enlarged?", "What is the size of the ventricles?"],
        ["The ventricles are {}.", "They are {}."],
    ),
    "lesion_side": (
        ["left", "right", "none"],
        ["On which side is the lesion?", "Is there a lesion, and on which side?"],
        ["Side of the lesion: {}.", "Lesion: {}."],
    ),
    "comparison": (
        ["larger", "smaller", "unchanged"],
        ["How have the ventricles changed?", "Are the ventricles larger, smaller or unchanged?"],
        ["The ventricles are {}.", "They are {} now."],
    ),
    "active_hemisphere": (
        ["left", "right"],
        ["Which hemisphere is active?", "In which hemisphere does the signal change?"],
        ["The {} hemisphere is active.", "It is the {} one."],
    ),
}
REFERENCE = "This is the reference scan.", "I see it."  # what is said before the second scan of a comparison


def random_head(rng):
    lesion = str(rng.choice(["left", "right", "none"], p=[0.42, 0.33, 0.25]))
    return {
        "radii": (rng.uniform(0.95, 1.05, 3) * (72, 88, 72)).tolist(),  # mm
        "center": rng.uniform(-4, 4, 3).tolist(),
        "bumps": rng.uniform(-0.02, 0.02, (4, 3)).tolist(),
        "ventricle_size": str(rng.choice(list(VENTRICLES), p=[0.54, 0.46])),
        "ventricles": rng.uniform(0.9, 1.1),
        "lesion_side": lesion,
        "lesion": (rng.uniform((24, -28, -15), (34, 28, 22)) * (-1 if lesion == "left" else 1, 1, 1)).tolist(),
        "lesion_radius": rng.uniform(14, 18),
        "active_hemisphere": str(rng.choice(["left", "right"], p=[0.54, 0.46])),
    }


def draw_head(rng, head, modality):
    """The voxels as int16, in RAS: zero outside the head, and as bright as the scanner likes."""
    scan = SCANS[modality]
    sides = zip(scan["shape"], scan["voxel"], head["center"], strict=False)  # of a series without its time
    mm = [size * (np.arange(n) - (n - 1) / 2) - center for n, size, center in sides]
    x, y, z = np.ix_(*(axis.astype(np.float32) for axis in mm))  # from the head's centre
    bumpy = 1 + 0.02 * sum(np.sin(a * x + b * y + c * z) for a, b, c in head["bumps"])  # no head is an ellipsoid

    def inside(radii, center=(0, 0, 0)):
        """1 within the ellipsoid, 0 outside, and something between where its surface cuts a voxel."""
        distance = np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), center, radii, strict=True)))
        return np.clip((bumpy - distance) * (radii[0] / scan["voxel"][0]) + 0.5, 0, 1)

    skull, brain, white = (inside([share * radius for radius in head["radii"]]) for share in (0.92, 0.84, 0.6))
    voxels = 0.6 * inside(head["radii"]) - 0.4 * skull  # skin and fat, and the dark bone below
    size = VENTRICLES[head["ventricle_size"]] * head["ventricles"]
    ventricles = sum(inside((7 * size, 20 * size, 10 * size), (side * (2 + 7 * size), -5, 8)) for side in (-1, 1))
    if modality == "T1":
        voxels += 0.5 * brain + 0.2 * white
        voxels += (0.2 - voxels) * np.clip(ventricles, 0, 1)
        if head["lesion_side"] != "none":
            voxels += (2.5 - voxels) * inside(3 * [head["lesion_radius"]], head["lesion"])
    else:
        active = brain * np.clip((-x if head["active_hemisphere"] == "left" else x) / 10, 0, 1)
        course = np.array([-1, 1, -1, 1])  # on average it is as bright as the other one
        voxels = (voxels + 0.4 * brain + 0.2 * ventricles)[..., None] + 0.12 * active[..., None] * course
    voxels += 0.02 * rng.standard_normal(voxels.shape, dtype=np.float32) * (voxels > 0)
    return np.clip(voxels * rng.uniform(300, 3000), 0, None).astype(np.int16)


def mri_conversation(rng, subject, task, label, modality, paths):
    """A conversation in UMBRELLA's form. A turn's scan comes first, so all about one scan begin alike."""
    labels, questions, answers = MRI_TASKS[task]
    said = [str(rng.choice(questions)), str(rng.choice(answers)).format(label)]
    turns = []
    for number, text in enumerate([*REFERENCE, *said] if len(paths) == 2 else said):
        scan = [{"type": "image", "modality": modality, "image_path": paths[number // 2]}] if number % 2 == 0 else []
        turns.append({"role": ["user", "assistant"][number % 2], "content": [*scan, {"type": "text", "text": text}]})
    return {
        "task_id": f"{subject}_{task}",
        "task_type": task,
        "subject_ids": [subject],
        "modalities": [modality for _ in paths],
        "images": [{"path": path, "token": "<image>", "modality": modality} for path in paths],
        "conversations": turns,
        "answer_candidates": labels,
        "metadata": {"label": label},
    }


def random_subject(rng, number):
    """{path: (voxels, modality)} and conversations. Of three subjects one has a second T1, one a series."""
    subject, head = f"sub-{number + 1:04d}", random_head(rng)
    first, later, series = (f"volumes/{subject}_{name}.nii.gz" for name in ("T1w", "ses-02_T1w", "task-rest_bold"))
    volumes = {first: (draw_head(rng, head, "T1"), "T1")}
    asked = [(task, head[task], "T1", [first]) for task in ("ventricle_size", "lesion_side")]
    if number % 3 == 0:
        before, after = head["ventricle_size"], str(rng.choice(list(VENTRICLES)))
        change = "unchanged" if after == before else "larger" if after == "enlarged" else "smaller"
        volumes[later] = draw_head(rng, head | {"ventricle_size": after}, "T1"), "T1"
        asked.append(("comparison", change, "T1", [first, later]))
    if number % 3 == 1:
        volumes[series] = draw_head(rng, head, "rsfMRI"), "rsfMRI"
        asked.append(("active_hemisphere", head["active_hemisphere"], "rsfMRI", [series]))
    return volumes, [mri_conversation(rng, subject, *about) for about in asked]
