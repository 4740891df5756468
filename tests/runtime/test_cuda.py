"""What only a GPU does is decided, and computed, as it would be there: rehearsed on a CPU."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import difference, metrics_of, read_tensors, run, stop_in
from test_attention import decoder, packed, states
from torch.nn.attention import flex_attention
from torch.utils.data import Dataset

import common
from runtime import attention, batches, optimizers
from runtime.program import pick_device

SMALL = ["--limit", 40, "--questions-per-step", 12, "--max-steps", 2, "--lr", 1e-3, "--save-every", 1]
SMALL += ["--max-answer-tokens", 1]


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without a compiler: graphs are traced and guarded as ever, and run as they are. Their number."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_flexattention_in_compiled_layers_equals_the_complete_sequence_at_any_length(monkeypatch, graphs):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # refuses gradients on a CPU, but has them
    plain, compiled = decoder(2), decoder(2).train()
    attention.compile_layers(compiled, torch.device("cuda"))
    counts = []
    for trees in ([(90, 9), (40, 3)], [(130, 1)], [(260, 30), (3, 1), (50, 20)], [(200, 2), (200, 2)]):
        batch = packed(*trees)
        assert difference(states(compiled, batch, True), states(plain, batch, False)) < 1e-5
        counts.append(graphs())
    assert counts == counts[:1] * 4  # no length compiles again
    with torch.no_grad():
        compiled.eval()
        states_of = partial(common.last_hidden, compiled, torch.randn(1, 9, 32), torch.arange(9)[None])
        states_of(torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    assert graphs() == counts[0]  # answering is not compiled


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_with_dropout_is_compiled_without_flexattention(graphs, monkeypatch, dropout):
    called, model, batch = [], decoder(1).train(), packed((9, 2))
    model.layers[0].self_attn.attention_dropout = dropout
    monkeypatch.setattr(attention, "flex_attention", lambda query, *_, **__: called.append(query.shape) or query)
    attention.compile_layers(model, torch.device("cuda"))
    states(model, batch, True)
    assert bool(called) == (not dropout)


def test_compiled_layers_and_a_fused_optimizer_stop_and_resume_as_one_run(demo_folder, tmp_path, monkeypatch, graphs):
    flags, groups = [*SMALL, "--lora-dropout", 0.1], optimizers.parameter_groups
    run(demo_folder, tmp_path / "plain", *flags)
    flags += ["--compile", "--grad-checkpoint"]
    monkeypatch.setattr(optimizers, "parameter_groups", lambda *a: [g | {"fused": True} for g in groups(*a)])
    run(demo_folder, tmp_path / "one", *flags)
    assert graphs() > 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in(patch, 1)
        run(demo_folder, tmp_path / "two", *flags)
    run(demo_folder, tmp_path / "two", *flags)
    one, two = (read_tensors(tmp_path / name / "adapter") for name in ("one", "two"))
    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    norms = [[line["grad_norm"] for line in metrics_of(tmp_path / n) if "loss" in line] for n in ("one", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)  # with the same dropout, also where activations come again


def test_only_whole_parameters_on_a_gpu_are_updated_by_one_kernel():
    args = SimpleNamespace(parts={}, weight_decay=0.1, lr=1.0)
    on_cpu = torch.nn.Parameter(torch.ones(2, 2))
    on_gpu = SimpleNamespace(ndim=2, is_cuda=True, numel=on_cpu.numel)
    groups = optimizers.parameter_groups({"a": on_cpu, "b": on_gpu, "c": on_cpu}, args)
    assert [(len(group["params"]), group["fused"]) for group in groups] == [(2, False), (1, True)]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as torch would see them."""
    calls = {"is_available": True, "device_count": 2, "set_device": None, "get_device_name": "Tesla V100"}
    for name, value in (calls | {"is_bf16_supported": True}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    tf32, cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield monkeypatch
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_on_a_gpu_numbers_are_bf16_or_float32_without_tf32_and_cudnn_s_attention_is_off(gpus, device):
    chosen = torch.device("cuda", int(device[-1]) if ":" in device else 0)
    assert pick_device(device, "auto") == (chosen, torch.bfloat16)
    assert pick_device(device, "fp32") == (chosen, torch.float32)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_card_without_bf16_takes_float32_and_refuses_bf16(gpus):
    asked = []
    gpus.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.append(given))
    assert pick_device("cuda", "auto")[1] == torch.float32
    with pytest.raises(SystemExit, match="--dtype bf16: Tesla V100 only imitates it, slowly; use --dtype fp32"):
        pick_device("cuda", "bf16")
    assert asked == [{"including_emulation": False}] * 2


def test_ranks_do_not_share_the_gpu_that_one_flag_names(gpus):
    gpus.setitem(os.environ, "WORLD_SIZE", "2")
    gpus.setitem(os.environ, "LOCAL_RANK", "1")
    assert pick_device("cuda", "auto")[0] == torch.device("cuda:1")
    with pytest.raises(SystemExit, match="--device cuda:0: all ranks would use this one GPU"):
        pick_device("cuda:0", "auto")


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: done.append(non_blocking) or tensor)
    batch = {"input_ids": torch.ones(1, 2), "prompts": ["a tree"]}
    assert batches.to_device(batch, torch.device("cuda")) == batch
    assert done == ["pinned", True]


class Large:
    def __reduce__(self):  # as a tensor that is handed over
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


class Items(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Large:
        return Large()


def test_a_full_dev_shm_is_said_at_once(monkeypatch):
    monkeypatch.setattr(batches, "PATIENCE", 60)
    settings = SimpleNamespace(args=SimpleNamespace(workers=1), stop=SimpleNamespace(received=None))
    loaded = batches.load(Items(), settings)
    fault = str(next(loaded))
    loaded.close()
    assert "of room in /dev/shm (docker --shm-size): use fewer --workers" in fault
