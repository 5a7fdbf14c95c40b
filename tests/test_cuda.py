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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_float32():
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield


def light() -> MaskSAM:
    torch.manual_seed(0)
    return MaskSAM(
        MaskSAMConfig(
            "mobile_sam", num_classes=3, num_queries=3, patch_size=(2, 32, 32), encoder_size=(96, 96)
        )
    )


def on_gpu(pair):
    """A volume and its segments on the GPU."""
    return pair[0].to(DEVICE), type(pair[1])(*(part.to(DEVICE) for part in pair[1]))


def run(net: MaskSAM, device: str, amp: torch.dtype | None = None) -> tuple[dict, list]:
    """Outputs and gradients of one step, on the CPU."""
    net = copy.deepcopy(net).to(device)
    volume, segments = task(net)
    with torch.autocast(device, amp, enabled=amp is not None):
        outputs = net(volume.to(device))
    loss, _ = SetCriterion()(outputs, type(segments)(*(part.to(device) for part in segments)))
    loss.backward()
    grads = [parameter.grad.cpu() for parameter in net.parameters() if parameter.requires_grad]
    return {key: value.float().cpu() for key, value in outputs.items()}, grads


def error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("make", [tiny, light], ids=["tiny", "mobile_sam"])
@pytest.mark.parametrize("amp, limit", [(None, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bf16"])
def test_cuda_equals_the_cpu_in_outputs_and_gradients(make, amp, limit):
    net = make()
    wake(net.encoder_adapters, 0.05)
    (expected, grads), (found, cuda_grads) = run(net, "cpu"), run(net, DEVICE, amp)
    for key in expected:
        assert error(found[key], expected[key]) < limit, key
    # In bf16 single small gradients are noise: all of them together are compared.
    together = [torch.cat([grad.flatten() for grad in each]) for each in (cuda_grads, grads)]
    assert error(*together) < 3 * limit


@pytest.mark.parametrize("h, w, c", [(14, 14, 64), (16, 16, 32), (64, 64, 64), (64, 64, 80)])
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bf16"]
)
def test_fused_attention_equals_attention_by_rows_with_gradients(h, w, c, dtype, limit):
    torch.manual_seed(0)
    inputs = [0.3 * torch.randn(2, 2, h, w, width, device=DEVICE) for width in (c, c, c, h, w)]
    expected_inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    upstream = torch.randn(2, 2, h, w, c, device=DEVICE)
    expected, found = A.attend_by_rows(*expected_inputs), A.attend_fused(*inputs)
    assert error(found.float(), expected) < limit
    grads = torch.autograd.grad(expected, expected_inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream.to(dtype)), grads):
        assert error(ours.float(), theirs) < 2 * limit


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale():
    net = tiny().to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    volume, segments = on_gpu(task(net))
    with torch.autocast("cuda", torch.float16):
        outputs = net(volume)
    scaler.scale(SetCriterion()(outputs, segments)[0]).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_step_waits_for_the_gpu_at_most_twice():
    net = tiny(sam="vit_b", encoder_size=(128, 128)).to(DEVICE)
    net.gradient_checkpointing = True
    volume, segments = on_gpu(task(net))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            outputs = net(volume)
        SetCriterion()(outputs, segments)[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # fills the caches of grids
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) <= 2, [
        (w.filename, w.lineno) for w in seen
    ]


def test_a_step_of_the_acdc_preset_fits_into_ten_gib():
    net = MaskSAM(MaskSAMConfig()).to(DEVICE)
    net.gradient_checkpointing = True
    volume, segments = on_gpu(task(net, batch=2))
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        outputs = net(volume)
    SetCriterion()(outputs, segments)[0].backward()
    assert torch.cuda.max_memory_allocated() < 10 * 2**30


def test_a_phantom_run_resumes_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phantom.write_phantom(tmp_path / "phantom", 4)
    sizes = "--iterations 2 --epochs 2 --val-every 1 --patch 4 128 128 --encoder 128 128 --workers 0"
    arguments = ["--root", str(tmp_path / "phantom"), "--device", "cuda", *sizes.split()]
    train.main(arguments)
    run_folder = next((tmp_path / "runs").iterdir())
    assert (run_folder / "best.pt").exists()
    train.main([*arguments, "--resume"])


def test_nccl_with_one_process_takes_a_step():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        net = tiny().to(DEVICE)
        wrapped = torch.nn.parallel.DistributedDataParallel(net, [0])
        volume, segments = task(net)
        loss, _ = SetCriterion()(
            wrapped(volume.to(DEVICE)), type(segments)(*(p.to(DEVICE) for p in segments))
        )
        loss.backward()
        assert loss.isfinite()
    finally:
        torch.distributed.destroy_process_group()
