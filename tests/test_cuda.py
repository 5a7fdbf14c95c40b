"""What only a GPU can show; skipped without one.   python -m pytest tests/test_cuda.py"""

import copy
import os
import warnings

import pytest
import torch

import train
from matcher import SetCriterion
from model import MaskSAM, MaskSAMConfig
from networks import task, tiny, wake
from support import attention as A
from support import phantom
from support.presets import PRESETS
from support.sam import store_frozen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, BF16 = "cuda", torch.bfloat16
AMP = pytest.mark.parametrize("amp, limit", [(None, 1e-3), (BF16, 0.1)], ids=["float32", "bf16"])


@pytest.fixture(autouse=True)
def full_float32():
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def batch_of(net: MaskSAM, batch: int = 1):
    """A volume and its segments, where the network is."""
    volume, segments = task(net, batch)
    return volume.to(net.class_tokens.device), segments._make(x.to(net.class_tokens.device) for x in segments)


def step(net: MaskSAM, amp: torch.dtype | None, batch: tuple, scale=lambda loss: loss) -> dict:
    """Outputs of one forward and backward."""
    with torch.autocast(batch[0].device.type, amp, enabled=amp is not None):
        outputs = net(batch[0])
    scale(SetCriterion()(outputs, batch[1])[0]).backward()
    return outputs


def error(found, expected) -> float:
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-6))


def adamw(net: MaskSAM) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)


@pytest.mark.parametrize("sam, size", [("tiny", (64, 64)), ("mobile_sam", (96, 96))])
@AMP
def test_cuda_equals_the_cpu_in_outputs_and_gradients(sam, size, amp, limit):
    net = tiny(sam=sam, encoder_size=size)
    wake(net.encoder_adapters, 0.05)
    gpu = copy.deepcopy(net).to(DEVICE)
    expected, found = step(net, None, batch_of(net)), step(gpu, amp, batch_of(gpu))
    for key in expected:
        assert error(found[key].cpu(), expected[key]) < limit, key
    # In bf16 single small gradients are noise: all of them together are compared.
    grads = [[p.grad.cpu().flatten() for p in n.parameters() if p.requires_grad] for n in (gpu, net)]
    assert error(*map(torch.cat, grads)) < 3 * limit


@pytest.mark.parametrize("h, w, c", [(14, 14, 64), (16, 16, 32), (64, 64, 64), (64, 64, 80)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (BF16, 2e-2)], ids=["float32", "bf16"])
def test_fused_attention_equals_attention_by_rows_with_gradients(h, w, c, dtype, limit):
    inputs = [0.3 * torch.randn(2, 2, h, w, width, device=DEVICE) for width in (c, c, c, h, w)]
    expected_inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    upstream = torch.randn(2, 2, h, w, c, device=DEVICE)
    expected, found = A.attend_by_rows(*expected_inputs), A.attend_fused(*inputs)
    assert error(found, expected) < limit
    grads = torch.autograd.grad(expected, expected_inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream.to(dtype)), grads):
        assert error(ours, theirs) < 2 * limit


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale():
    optimizer, scaler = adamw(net := tiny().to(DEVICE)), torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    step(net, torch.float16, batch_of(net), scaler.scale)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_step_waits_for_the_gpu_at_most_twice():
    net = tiny(sam="vit_b", encoder_size=(128, 128)).to(DEVICE)
    net.gradient_checkpointing, optimizer, batch = True, adamw(net), batch_of(net)

    def whole_step() -> None:
        step(net, BF16, batch)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.step()
        optimizer.zero_grad()

    whole_step()  # fills the caches of grids
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        whole_step()
        torch.cuda.set_sync_debug_mode("default")
    places = [(w.filename, w.lineno) for w in seen if "synchroniz" in str(w.message)]
    assert len(places) <= 2, places


@pytest.mark.parametrize("name, gib", [("acdc", 10), ("amos", 22)])
def test_a_step_of_a_preset_fits_into_its_memory(name, gib):
    sizes = {key: getattr(PRESETS[name], key) for key in ("patch_size", "encoder_size", "num_queries")}
    net = MaskSAM(MaskSAMConfig(num_classes=len(PRESETS[name].task.labels), **sizes)).to(DEVICE)
    store_frozen(net.sam, BF16)
    net.gradient_checkpointing = True
    torch.cuda.reset_peak_memory_stats()
    step(net, BF16, batch_of(net, 2))
    assert torch.cuda.max_memory_allocated() < gib * 2**30


def test_a_phantom_run_resumes_on_the_gpu(tmp_path):
    phantom.write_phantom("phantom", 4)
    line = "--root phantom --device cuda --iterations 2 --epochs 2 --val-every 1 --workers 0".split()
    line += "--patch 4 128 128 --encoder 128 128".split()
    train.main(line)
    assert next((tmp_path / "runs").iterdir()).joinpath("best.pt").exists()
    train.main([*line, "--resume"])


def test_nccl_with_one_process_takes_a_step():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        net = tiny().to(DEVICE)
        outputs = step(torch.nn.parallel.DistributedDataParallel(net, [0]), BF16, batch_of(net))
        assert all(output.isfinite().all() for output in outputs.values()) and net.class_tokens.grad.any()
    finally:
        torch.distributed.destroy_process_group()
