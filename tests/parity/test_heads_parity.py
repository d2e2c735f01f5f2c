"""The predictor bank against separate MLPs built from torch's own layers and called view by view."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mvssl.config.recipe import Head
from mvssl.models.heads import MLP, BankLayerNorm, PredictorBank
from pipelines.runtime import InputError

TASKS = ("global", "local", "cutout")
SLOTS = (0, 0, 1, 1, 2)


def torch_mlp(width: int, head: Head) -> nn.Sequential:
    layer_norm = head.norm == "layer"
    layers: list[nn.Module] = []
    for hidden in head.hidden:
        norm = nn.LayerNorm(hidden) if layer_norm else nn.BatchNorm1d(hidden)
        layers += [nn.Linear(width, hidden, bias=False), norm, nn.ReLU()]
        width = hidden
    layers.append(nn.Linear(width, head.out))
    if head.output_norm:
        layers.append(
            nn.LayerNorm(head.out, elementwise_affine=False) if layer_norm else nn.BatchNorm1d(head.out, affine=False)
        )
    return nn.Sequential(*layers)


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)


HEADS = [
    Head(hidden=(7,), out=4),
    Head(hidden=(7, 6), out=4, output_norm=True),
    Head(hidden=(), out=4),
    Head(hidden=(7,), out=4, norm="layer"),
    Head(hidden=(7, 6), out=4, output_norm=True, norm="layer"),
]


@pytest.fixture(params=HEADS)
def pair(request: pytest.FixtureRequest) -> tuple[PredictorBank, list[nn.Sequential]]:
    """A bank and T torch MLPs with its weights, copied tensor by tensor."""
    bank = PredictorBank(TASKS, 5, request.param).double()
    randomise(bank, 1)
    singles = [torch_mlp(5, request.param).double() for _ in TASKS]
    for slot, single in enumerate(singles):
        own = single.state_dict()
        for name, tensor in bank.state_dict().items():
            value = tensor[slot]
            own[name.removeprefix("layers.")].copy_(value.T if value.dim() == 2 else value)
    return bank, singles


@pytest.mark.parametrize("slots", [SLOTS, (2, 0, 1), (0, 1, 2), (1,)])
def test_bank_equals_separate_mlps(pair: tuple[PredictorBank, list[nn.Sequential]], slots: tuple[int, ...]) -> None:
    bank, singles = pair
    z = torch.randn(len(slots), 6, 5, dtype=torch.float64, requires_grad=True)
    apart = z.detach().clone().requires_grad_()
    weight = torch.randn(len(slots), 6, 4, dtype=torch.float64)
    ours = bank(z, slots)
    expected = torch.stack([singles[slot](apart[view]) for view, slot in enumerate(slots)])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z.grad, apart.grad, rtol=1e-11, atol=1e-11)
    for name, p in bank.named_parameters():
        for slot, single in enumerate(singles):
            theirs = dict(single.named_parameters())[name.removeprefix("layers.")].grad
            assert p.grad is not None
            mine = p.grad[slot]
            if theirs is None:  # no view went through this slot
                assert not mine.any()
            else:
                torch.testing.assert_close(mine.T if mine.dim() == 2 else mine, theirs, rtol=1e-11, atol=1e-11)
    for name, buffer in bank.named_buffers():
        for slot, single in enumerate(singles):
            theirs = dict(single.named_buffers())[name.removeprefix("layers.")]
            torch.testing.assert_close(buffer[slot], theirs, rtol=1e-13, atol=1e-13)

    bank.eval()
    expected = torch.stack([singles[slot].eval()(apart[view]) for view, slot in enumerate(slots)])
    torch.testing.assert_close(bank(z, slots), expected, rtol=1e-12, atol=1e-12)


def test_conversions_keep_everything(pair: tuple[PredictorBank, list[nn.Sequential]]) -> None:
    bank, singles = pair
    mlps = bank.to_mlps()
    assert tuple(mlps) == TASKS
    for mlp, single in zip(mlps.values(), singles, strict=True):
        for name, value in single.state_dict().items():
            assert torch.equal(mlp.state_dict()[name], value)
    back = PredictorBank.from_mlps(mlps)
    assert back.tasks == TASKS
    for name, value in bank.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
        assert back.state_dict()[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("head", HEADS)
def test_mlp_is_torchs_own_layers(head: Head) -> None:
    ours, single = MLP(5, head).double(), torch_mlp(5, head).double()
    randomise(single, 1)
    assert list(ours.state_dict()) == list(single.state_dict())
    ours.load_state_dict(single.state_dict())
    x = torch.randn(6, 5, dtype=torch.float64)
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), single.train(training)(x))


def test_names_of_stacked_norms() -> None:
    affine = ["layers.1.weight", "layers.1.bias"]
    tracked = ["layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked"]
    linear = ["layers.0.weight"], ["layers.3.weight", "layers.3.bias"]
    norms: dict[Literal["batch", "layer"], list[str]] = {"batch": affine + tracked, "layer": affine}
    for norm, own in norms.items():
        bank = PredictorBank(TASKS, 5, Head(hidden=(7,), out=4, norm=norm))
        assert list(bank.state_dict()) == [*linear[0], *own, *linear[1]]
        assert bank.layers[1].weight.shape == bank.layers[1].bias.shape == (3, 7)


def test_layer_norm_against_its_formula() -> None:
    """(x - mean) / sqrt(var + 1e-5) over the features, with numbers worked out one by one."""
    norm: Any = BankLayerNorm(2, 3).double()
    randomise(norm, 1)
    x = torch.randn(3, 4, 3, dtype=torch.float64) * 0.01  # small, so that eps counts
    slots = (1, 0, 1)
    y = norm(x, slots)
    plain = BankLayerNorm(2, 3, affine=False).double()(x, slots)
    for view, slot in enumerate(slots):
        for row in range(4):
            numbers = x[view, row].tolist()
            mean = sum(numbers) / 3
            deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / 3 + 1e-5)
            for c, number in enumerate(numbers):
                unit = (number - mean) / deviation
                assert plain[view, row, c].item() == pytest.approx(unit, rel=1e-9, abs=1e-12)
                scaled = unit * norm.weight[slot, c].item() + norm.bias[slot, c].item()
                assert y[view, row, c].item() == pytest.approx(scaled, rel=1e-9, abs=1e-12)


def test_layer_norm_needs_no_other_image() -> None:
    bank = PredictorBank(TASKS, 5, Head(hidden=(7, 6), out=4, output_norm=True, norm="layer")).double()
    z = torch.randn(5, 6, 5, dtype=torch.float64)
    whole = bank(z, SLOTS)
    parts = [bank(z[:, i : i + 1], SLOTS) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)


def test_mlps_of_other_shapes_make_no_bank() -> None:
    with pytest.raises(InputError, match="one or more of one shape"):
        PredictorBank.from_mlps({"a": MLP(5, Head(hidden=(7,), out=4)), "b": MLP(6, Head(hidden=(7,), out=4))})
    with pytest.raises(InputError, match="got 0 predictors"):
        PredictorBank.from_mlps({})
    with pytest.raises(InputError, match="2 predictors of 2 shapes"):
        PredictorBank.from_mlps({"a": MLP(5, Head(out=4)), "b": MLP(5, Head(out=4, norm="layer"))})


def ks_distance(sample: Tensor, bound: float) -> float:
    """Largest distance between a sample's distribution function and that of the uniform one in [-bound, bound]."""
    ordered = sample.flatten().sort().values.double()
    uniform = (ordered + bound) / (2 * bound)
    return (torch.arange(1, len(ordered) + 1) / len(ordered) - uniform).abs().max().item()


def test_initialisation_is_that_of_linear_layers() -> None:
    torch.manual_seed(0)
    head = Head(hidden=(400,), out=300)
    bank: Any = PredictorBank(TASKS, 100, head)
    single: Any = torch_mlp(100, head)
    for index, fan_in in ((0, 100), (3, 400)):
        bound = 1 / math.sqrt(fan_in)
        for slot in range(len(TASKS)):
            weight = bank.layers[index].weight[slot].detach()
            # 1.95 / sqrt(n) is passed by a true sample with probability 0.999.
            assert ks_distance(weight, bound) < 1.95 / math.sqrt(weight.numel())
        assert ks_distance(single[index].weight.detach(), bound) < 1.95 / math.sqrt(single[index].weight.numel())
        assert not torch.equal(bank.layers[index].weight[0], bank.layers[index].weight[1])
    bias = bank.layers[3].bias.detach()
    assert ks_distance(bias, 1 / 20) < 1.95 / math.sqrt(bias.numel())
    assert (bank.layers[1].weight == 1).all()
    assert (bank.layers[1].bias == 0).all()
