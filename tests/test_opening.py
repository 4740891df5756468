"""One way to open a checkpoint in every script: a missing weight is refused, its chat template is found and named."""

import json
import shutil

import pytest
from helpers import load_demo, refused
from safetensors.torch import load_file, save_file

import train_llava_med
import train_qwen2vl_sentinel


@pytest.mark.parametrize("script, name", [(train_llava_med, "demo"), (train_qwen2vl_sentinel, "qwen")])
def test_a_checkpoint_without_a_weight_is_refused_by_name(script, name, request, tmp_path):
    """Drawn at random it would train, exit 0, and answer otherwise each time it is opened."""
    folder = request.getfixturevalue(f"{name}_folder")
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(folder / "data")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lost = min(key for key in weights if "multi_modal_projector" in key or "merger" in key)
    del weights[lost]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    text = refused(tmp_path, tmp_path / "out", "--max-steps", 1, script=script)
    assert "1 weights are missing, such as" in text and lost.rpartition(".")[2] in text
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_the_checkpoints_own_template_is_used_wherever_it_stands(demo_folder, tmp_path, place, capsys):
    shutil.copytree(demo_folder / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(demo_folder / "data")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    template = "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}"
    template += "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    (tmp_path / "model" / place).write_text(json.dumps({"chat_template": template}))
    demo = load_demo(tmp_path)
    assert "USER: " in train_llava_med.render(demo.rows[0], demo.text)
    assert f"chat template: {tmp_path / 'model' / place}" in capsys.readouterr().out
