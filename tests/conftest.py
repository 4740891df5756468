"""Shared by the tests: a tiny checkpoint and data set in the real formats, written once a session."""

import os
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are of the CPU

import pytest
import torch
import transformers

from demo import qwen2vl_sentinel, recordings

torch.set_num_threads(1)  # tiny models; two test processes at a time use the second core
transformers.logging.disable_progress_bar()


def demo_of(name: str, folder, count: int = 60):
    """`model`, whose towers are left random to save their training, and `data`. Tests must not write here."""
    demo = import_module(f"demo.{name}")
    with pytest.MonkeyPatch.context() as patch:
        for module in (demo, qwen2vl_sentinel, recordings):  # the last two serve surg_video_vqa
            for learn in ("pretrain_tower", "pretrain_listener", "pretrain_umbrella"):
                if hasattr(module, learn):
                    patch.setattr(module, learn, lambda *_: None)
        demo.write_model(folder / "model", 0)
    demo.write_data(folder / "data", count, 0)
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
