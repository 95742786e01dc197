"""FLOPs by hand, peaks by data sheet, rates by a clock that the test turns."""

import pytest

from moe_train.diagnostics.throughput import Throughput, active_matmul_params, model_flops_per_token, peak_flops

# qwen3-30b-a3b, counted by hand: 48 layers, hidden 2048, 32 heads of 128, 4 key-value heads, 128 experts of 768, top 8
ATTENTION = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048
ROUTER = 2048 * 128
EXPERT = 3 * 2048 * 768
EMBEDDING = 151936 * 2048
TOTAL = 48 * (ATTENTION + ROUTER + 128 * EXPERT) + 2 * EMBEDDING
ACTIVE = 3_041_656_832


def qwen3_active():
    return active_matmul_params(
        total_params=TOTAL, embedding_params=EMBEDDING, expert_params=48 * 128 * EXPERT, num_experts=128, top_k=8
    )


def test_active_parameters_of_qwen3_30b():
    assert qwen3_active() == ACTIVE == 48 * (18_874_368 + 262_144 + 8 * 4_718_592) + 311_164_928


def test_flops_per_token_of_qwen3_30b():
    common = {"active_matmul_params": ACTIVE, "num_layers": 48, "num_heads": 32, "head_dim": 128}
    # 6 * 3,041,656,832 + 12 * 48 * 32 * 128 * 2048
    assert model_flops_per_token(**common, sequence_length=4096) == 18_249_940_992 + 4_831_838_208
    assert model_flops_per_token(**common, sequence_length=4096, causal=False) == 18_249_940_992 + 9_663_676_416


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bf16", None),
        ("NVIDIA B200", "fp32", None),
        ("NVIDIA A1000", "bf16", None),
        ("cpu", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_peaks(name, dtype, expected):
    assert peak_flops(name, dtype) == expected


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float8"):
        peak_flops("NVIDIA H200", "float8")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_and_mfu_over_windows():
    clock = Clock()
    meter = Throughput(flops_per_token=23_081_779_200, peak_flops_per_device=989.4e12, num_devices=16, clock=clock)
    clock.now += 2.0
    meter.add(400_000)
    meter.add(400_000)
    with meter.paused():
        clock.now += 30.0
    clock.now += 2.0
    rate = meter.read()
    assert (rate.tokens_per_s, rate.seconds) == (200_000.0, 4.0)
    assert rate.mfu == pytest.approx(200_000 * 23_081_779_200 / (16 * 989.4e12))
    assert rate.mfu == pytest.approx(0.29161, abs=1e-5)
    clock.now += 1.0
    meter.add(10)
    assert meter.read().tokens_per_s == 10.0
    assert meter.read().tokens_per_s == 0.0


def test_no_mfu_without_a_peak():
    clock = Clock()
    meter = Throughput(flops_per_token=1e9, peak_flops_per_device=None, clock=clock)
    clock.now += 1.0
    meter.add(5)
    rate = meter.read()
    assert (rate.tokens_per_s, rate.mfu) == (5.0, None)


def test_an_exception_inside_a_pause_still_ends_it():
    clock = Clock()
    meter = Throughput(clock=clock)

    def fail_inside():
        with meter.paused():
            clock.now += 5.0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    clock.now += 1.0
    meter.add(7)
    assert meter.read().tokens_per_s == 7.0
