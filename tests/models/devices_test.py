"""Figures of devices, by the names that JAX gives them."""

import types

import pytest

from adapt_pruner_jax.models import devices


@pytest.mark.parametrize(
  "kind, peak, memory",
  [
    ("NVIDIA A100-SXM4-40GB", 312e12, 40e9),
    ("NVIDIA A100-SXM4-80GB", 312e12, 80e9),
    ("NVIDIA A100 80GB PCIe", 312e12, 80e9),
    ("NVIDIA H100 80GB HBM3", 989e12, 80e9),
    ("NVIDIA H100 PCIe", 756e12, 80e9),
    ("NVIDIA H100 NVL", 835e12, 94e9),
    ("NVIDIA H200", 989e12, 141e9),
    ("NVIDIA GH200 480GB", 989e12, 96e9),
    ("NVIDIA B200", 2250e12, 180e9),
    ("NVIDIA GB200", 2500e12, 186e9),
    ("TPU v5 lite", 197e12, 16e9),
    ("TPU v5", 459e12, 95e9),
    ("TPU v5p", 459e12, 95e9),
    ("TPU v6 lite", 918e12, 32e9),
    ("TPU7x", 1153.5e12, 96e9),
  ],
)
def test_figures_of_a_kind(kind, peak, memory):
  assert devices.of_kind(kind) == devices.Device(peak, memory)
  device = types.SimpleNamespace(device_kind=kind)
  assert devices.peak_flops(device) == peak


def test_what_is_not_known():
  assert devices.of_kind("cpu") is None
  assert devices.peak_flops(types.SimpleNamespace(device_kind="cpu")) is None
