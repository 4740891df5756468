"""Shared by the tests: a tiny checkpoint and data set in the real formats, written once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are of the CPU

import pytest
import torch
import transformers

import demo

torch.set_num_threads(1)  # tiny models; two test processes at a time use the second core
transformers.logging.disable_progress_bar()


def demo_of(name: str, folder, count: int = 60):
    """`model`, whose towers are left random to save their training, and `data`. Tests must not write here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "pretrain_tower", lambda *_: None)
        patch.setattr(demo, "pretrain_listener", lambda *_: None)
        patch.setattr(demo, "pretrain_umbrella", lambda *_: None)
        getattr(demo, f"write_{name}_model")(folder / "model", 0)
    getattr(demo, f"write_{name}_data")(folder / "data", count, 0)
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    return demo_of("llava_med", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return demo_of("qwen2vl_sentinel", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    return demo_of("surg_video_vqa", tmp_path_factory.mktemp("video"), 20)


@pytest.fixture(scope="session")
def mri_folder(tmp_path_factory):
    return demo_of("umbrella_mri", tmp_path_factory.mktemp("mri"))


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    return demo_of("video_plain_lm", tmp_path_factory.mktemp("plain"), 40)
