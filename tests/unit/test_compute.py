from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import networks as nets
from unbackdoor import compute
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages

CPU = torch.device("cpu")


class FirstPixels(nn.Module):
    """Its logits are the first three values of the image; it has no tensors of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def test_device_of_looks_at_parameters_then_buffers() -> None:
    assert compute.device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert compute.device_of(nn.BatchNorm2d(2, affine=False, device="meta")).type == "meta"
    assert compute.device_of(FirstPixels()) == CPU


def test_mode_restores_each_flag_even_after_an_error() -> None:
    model = nets.SmallConvNet().train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]

    def fail() -> None:
        with compute.mode(model, training=False):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == flags
    with compute.mode(model, training=True):
        assert all(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_logits_do_not_depend_on_the_batch_size_or_the_mode(batch_size: int) -> None:
    model = nets.randomise(nets.SmallConvNet()).train()
    statistics = model.get_buffer("bn1.running_mean").clone()
    logits = compute.logits_of(model, nets.images(7, size=8), batch_size=batch_size)
    assert model.training
    assert torch.equal(model.get_buffer("bn1.running_mean"), statistics)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.eval()(nets.images(7, size=8)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "error", [AssertionError, ValueError, KeyError, ZeroDivisionError, NotImplementedError]
)
def test_what_a_network_checks_of_its_inputs_is_a_sentence(error: type[Exception]) -> None:
    class Strict(FirstPixels):
        def forward(self, x: Tensor) -> Tensor:
            raise error("wants 32 pixels") if x.shape[-1] == 8 else error

    data = LabelledImages(nets.images(2, size=8), torch.tensor([0, 1]))
    with pytest.raises(
        UnsupportedModelError, match=r"wants 32 pixels.*; check the architecture and the images"
    ):
        compute.check_fits(Strict(), data, purpose="x")
    small = LabelledImages(nets.images(2, size=4), torch.tensor([0, 1]))
    with pytest.raises(UnsupportedModelError, match=rf"\({error.__name__}\); check the architecture"):
        compute.check_fits(Strict(), small, purpose="x")


def test_bytes_are_scaled_to_the_unit_interval() -> None:
    images = torch.tensor([0, 51, 255, 7], dtype=torch.uint8).view(1, 1, 2, 2)
    torch.testing.assert_close(compute.logits_of(FirstPixels(), images), torch.tensor([[0.0, 0.2, 1.0]]))


def test_no_images_give_no_logits() -> None:
    assert compute.logits_of(FirstPixels(), torch.empty(0, 1, 2, 2)).shape[0] == 0


def test_predictions_and_accuracy_by_hand() -> None:
    images = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.2, 0.7, 0.0], [0.3, 0.4, 0.3, 0.0]]).view(3, 1, 2, 2)
    assert compute.predictions_of(FirstPixels(), images).tolist() == [0, 2, 1]
    data = LabelledImages(images, torch.tensor([0, 2, 2]))
    assert compute.accuracy_of(FirstPixels(), data) == pytest.approx(2 / 3)
    assert compute.accuracy_of(FirstPixels(), data, batch_size=1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(16, torch.channels_last), (32, torch.channels_last), (8, torch.contiguous_format)],
)
def test_odd_widths_keep_the_default_layout(channels: int, expected: torch.memory_format) -> None:
    assert compute.memory_format_for(nn.Conv2d(3, channels, 3)) == expected


def test_one_odd_layer_decides_for_the_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 17, 3))
    assert compute.memory_format_for(model) == torch.contiguous_format
    assert compute.memory_format_for(nn.Linear(3, 5)) == torch.channels_last


def test_plain_processors_stay_with_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not compute.has_fast_bf16(CPU)
    assert not compute.uses_bf16("auto", CPU)
    assert compute.uses_bf16("bf16", CPU)
    assert not compute.uses_bf16("fp32", CPU)


def test_missing_private_names_of_torch_mean_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not compute.has_fast_bf16(CPU)


def test_other_devices_have_no_fast_bf16() -> None:
    assert not compute.has_fast_bf16(torch.device("meta"))


def test_autocast_follows_the_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with compute.autocast("bf16", CPU):
        assert layer(x).dtype == torch.bfloat16
    with compute.autocast("fp32", CPU):
        assert layer(x).dtype == torch.float32


def test_autocast_sees_substituted_weights() -> None:
    """The weight cache of autocast would answer with the first cast of a tensor changed in place."""
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(2, 4)
    with compute.autocast("bf16", CPU):
        layer(x)
        with torch.no_grad():
            layer.weight.zero_()
        assert bool((layer(x) == 0).all())


def test_a_fitting_model_and_data_give_the_number_of_outputs() -> None:
    model = nets.randomise(nets.SmallConvNet()).train()
    data = LabelledImages(nets.images(3, size=8), torch.tensor([0, 3, 1]))
    state = torch.get_rng_state()
    assert compute.check_fits(model, data, purpose="this test") == nets.CLASSES
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_misfits_are_told_apart() -> None:
    model = nets.randomise(nets.SmallConvNet())
    images = nets.images(3, size=8)
    fitting = LabelledImages(images, torch.tensor([0, 1, 2]))
    with pytest.raises(InvalidInputError, match="this test needs at least 4"):
        compute.check_fits(model, fitting, purpose="this test", at_least=4)
    with pytest.raises(InvalidInputError, match="labels go up to 4, but the model has 4 outputs"):
        compute.check_fits(model, LabelledImages(images, torch.tensor([0, 4, 2])), purpose="this test")
    grey = LabelledImages(images[:, :1], torch.tensor([0, 1, 2]))
    with pytest.raises(UnsupportedModelError, match=r"shape \(1, 8, 8\)"):
        compute.check_fits(model, grey, purpose="this test")
    with pytest.raises(UnsupportedModelError, match=r"got tuple"):
        compute.check_fits(nets.TupleOutput(), fitting, purpose="this test")


def test_channels_are_those_of_the_first_convolution() -> None:
    model, images = nets.SmallConvNet(), nets.images(2, size=8)
    labels = torch.tensor([0, 1])
    compute.check_channels(model, LabelledImages(images, labels))
    with pytest.raises(
        InvalidInputError, match=r"have 1 channel\(s\), the model's first convolution takes 3"
    ):
        compute.check_channels(model, LabelledImages(images[:, :1], labels))


def test_devices_that_do_not_exist_and_that_are_not_here() -> None:
    assert compute.device_named("cpu").type == "cpu"
    with pytest.raises(InvalidInputError, match="unknown device 'gpu'; use cpu, cuda or auto"):
        compute.device_named("gpu")
    with pytest.raises(InvalidInputError, match="device 'cuda:99' is not available here"):
        compute.device_named("cuda:99")


def test_an_answer_that_is_no_number_is_no_class() -> None:
    class HalfBroken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = x.flatten(1)
            return torch.where(logits[:, :1] > 0.5, logits, math.nan)

    images = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).view(2, 1, 1, 2)
    assert compute.predictions_of(HalfBroken(), images).tolist() == [0, compute.NO_CLASS]
    assert compute.accuracy_of(HalfBroken(), LabelledImages(images, torch.zeros(2, dtype=torch.int64))) == 0.5
