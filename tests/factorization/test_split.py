from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.errors import RecipeError
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.router import expert_outputs
from llmsparse.factorization.split import SPLITS, Layout


def random_ffn(neurons: int = 48, width: int = 16, seed: int = 0) -> FFN:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(neurons, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return FFN(gate, up, down.T.contiguous())


def test_hand_worked_layout_of_172_neurons() -> None:
    """43 neurons a slot are stored as 48; the shared slot is filled up, the others share the 124 that are left."""
    layout = Layout(172, experts=4, shared=1, active=1)
    assert (layout.width, layout.shared_neurons, layout.routed_sizes) == (48, 48, [42, 41, 41])
    assert layout.active_share == pytest.approx(96 / 172)


def test_large_ffns_are_stored_in_tiles_of_64() -> None:
    assert Layout(5632, 16, 4, 4).width == 384
    assert Layout(14336, 16, 4, 4).width == 896
    assert Layout(768, 16, 4, 4).width == 48


@given(neurons=st.integers(8, 3000), data=st.data())
def test_any_number_of_experts_holds_every_neuron(neurons: int, data: st.DataObject) -> None:
    most = -(-neurons // Layout(neurons, 1, 0, 1).multiple)
    experts = data.draw(st.integers(1, most))
    shared = data.draw(st.integers(0, experts - 1))
    layout = Layout(neurons, experts, shared, active=1)
    layout.check("it")
    assert layout.shared_neurons + sum(layout.routed_sizes) == neurons
    assert 0 <= layout.shared_neurons <= shared * layout.width
    assert min(layout.routed_sizes) >= 1 and max(layout.routed_sizes) <= layout.width


def test_more_experts_than_groups_of_neurons_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"--experts 23: the FFN has 172 neurons, .* 22 groups of 8; use --experts 22"
    ):
        Layout(172, 23, 1, 1).check("the FFN")
    with pytest.raises(RecipeError, match="16 groups of 64"):
        Layout(1024, 17, 1, 1).check("the FFN")


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("shared", [0, 2])
def test_experts_of_any_split_add_up_to_the_dense_output(name: str, shared: int) -> None:
    """y = Σ oᵢ(x): the identity everything rests on."""
    ffn, layout = random_ffn(), Layout(48, experts=5, shared=shared, active=1)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    split = SPLITS[name](layout, ffn.loudness(x).T, torch.Generator().manual_seed(2))
    assert sorted(torch.cat([split.shared, *split.routed]).tolist()) == list(range(48))
    always = ffn.hidden(x)[:, split.shared] @ ffn.down[:, split.shared].T
    torch.testing.assert_close(expert_outputs(ffn, split, x).sum(1) + always, ffn(x), rtol=1e-5, atol=1e-4)
    assert split.owner[split.shared].eq(layout.routed).all()


def test_the_loudest_neurons_are_shared() -> None:
    profiles = torch.ones(32, 4)
    profiles[[3, 7, 20, 21, 22, 23, 30, 31]] = 5.0
    split = SPLITS["clustered"](Layout(32, experts=4, shared=1, active=1), profiles, torch.Generator())
    assert split.shared.tolist() == [3, 7, 20, 21, 22, 23, 30, 31]


def test_neurons_that_speak_up_together_become_an_expert() -> None:
    """Three groups, each loud on tokens of its own, however loud."""
    group = torch.arange(24) % 3
    profiles = torch.eye(3)[group].repeat_interleave(2, 1) * torch.linspace(1, 9, 24)[:, None]
    split = SPLITS["clustered"](Layout(24, experts=3, shared=0, active=1), profiles, torch.Generator().manual_seed(0))
    assert sorted(sorted(set(group[members].tolist())) for members in split.routed) == [[0], [1], [2]]


def test_contiguous_and_random_splits_are_what_they_say() -> None:
    layout = Layout(24, experts=3, shared=0, active=1)
    blank = torch.empty(24, 0)
    assert [members.tolist() for members in SPLITS["contiguous"](layout, blank, torch.Generator()).routed] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 24)),
    ]
    one, other = (SPLITS["random"](layout, blank, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.routed[0].tolist() != other.routed[0].tolist()


def test_a_split_is_copied_to_a_device_once() -> None:
    split = SPLITS["random"](Layout(48, 4, 1, 1), torch.empty(0), torch.Generator().manual_seed(0))
    assert split.on(torch.device("cpu")) is split
    meta = split.on(torch.device("meta"))
    assert meta is split.on(torch.device("meta"))
    assert meta.shared.is_meta and all(part.is_meta for part in meta.routed)
