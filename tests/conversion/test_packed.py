"""pack24, unpack24 and panels against definitions written out element by element."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import pack24, unpack24
from conversion.errors import InputError
from conversion.panel import to_panels

SHAPES = [(1, 8), (3, 40), (33, 24), (16, 8), (17, 64), (40, 576)]


def random_24(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    masked = torch.rand(weight.shape, generator=generator).argsort(-1)[..., :2]
    return weight.scatter(-1, masked, 0.0).reshape(rows, columns).to(dtype)


def pack_by_definition(weight):
    """Values and bitmask, one group at a time."""
    rows, columns = weight.shape
    values, bitmask = np.zeros((rows, columns // 2)), np.zeros((rows, columns // 8), np.uint8)
    for row in range(rows):
        for group in range(columns // 4):
            entries = [float(weight[row, 4 * group + c]) for c in range(4)]
            kept = [c for c in range(4) if entries[c] != 0]
            kept += [c for c in range(4) if entries[c] == 0][: 2 - len(kept)]
            for slot, c in enumerate(sorted(kept)):
                values[row, 2 * group + slot] = entries[c]
                column = 4 * group + c
                bitmask[row, column // 8] |= 1 << column % 8
    return values, bitmask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_pack_follows_the_definition_and_unpack_reverses_it(rows, columns, dtype):
    weight = random_24(rows, columns, dtype)
    values, bitmask = pack24(weight)
    expected_values, expected_bitmask = pack_by_definition(weight)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.double().numpy(), expected_values)
    np.testing.assert_array_equal(bitmask.numpy(), expected_bitmask)
    restored = unpack24(values, bitmask)
    assert restored.dtype == dtype
    assert torch.equal(restored, weight)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(16)), st.booleans()), min_size=2, max_size=2))
def test_groups_with_fewer_than_two_nonzeros_keep_their_first_zeros(groups):
    weight = torch.tensor([[float(pattern >> c & 1) for pattern, _ in groups for c in range(4)]])
    if any(pattern.bit_count() > 2 for pattern, _ in groups):
        with pytest.raises(InputError):
            pack24(weight)
        return
    values, bitmask = pack24(weight)
    expected_values, expected_bitmask = pack_by_definition(weight)
    np.testing.assert_array_equal(values.numpy(), expected_values)
    np.testing.assert_array_equal(bitmask.numpy(), expected_bitmask)


def test_minus_zero_becomes_plus_zero():
    values, _ = pack24(torch.tensor([[-0.0, -0.0, -0.0, 1.0, -0.0, 2.0, -0.0, -0.0]]))
    assert not values.signbit().any()


def test_transposed_and_strided_weights_pack_like_their_copies():
    weight = random_24(24, 16)
    for view in (weight.T.contiguous().T, weight.repeat_interleave(2, 0)[::2]):
        assert not view.is_contiguous()
        for ours, expected in zip(pack24(view), pack24(weight), strict=True):
            assert torch.equal(ours, expected)


def test_a_parameter_packs_without_gradient():
    values, _ = pack24(torch.nn.Parameter(random_24(4, 8)))
    assert not values.requires_grad


def test_the_first_offending_group_is_named():
    weight = random_24(5, 32)
    weight[2, 20:23] = 1.0
    weight[4, 0:4] = 1.0
    with pytest.raises(ValueError, match=r"row 2, group 5 \(columns 20 to 23\)"):
        pack24(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(bad):
    weight = random_24(3, 16)
    weight[1, 9] = bad
    with pytest.raises(InputError, match="row 1, group 2"):
        pack24(weight)


@pytest.mark.parametrize("weight", [torch.zeros(2, 12), torch.zeros(8), torch.zeros(2, 8, dtype=torch.int8)])
def test_what_cannot_be_packed_is_refused(weight):
    with pytest.raises(InputError):
        pack24(weight)


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - {3, 5, 6, 9, 10, 12}))
def test_every_invalid_nibble_is_refused_by_row_and_group(nibble):
    values, bitmask = pack24(random_24(4, 32))
    bitmask[3, 2] = bitmask[3, 2] & 0x0F | nibble << 4
    with pytest.raises(InputError, match="row 3, group 5"):
        unpack24(values, bitmask)


def test_values_of_another_shape_are_refused():
    values, bitmask = pack24(random_24(4, 32))
    with pytest.raises(InputError, match="do not belong together"):
        unpack24(values[:, :-2], bitmask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_panels_follow_the_definition(rows, columns, dtype):
    weight = random_24(rows, columns, dtype)
    values, indices = to_panels(*pack24(weight))
    panels, groups = -(-rows // 16), columns // 4
    assert indices.dtype == torch.uint32
    assert indices.shape == (panels, -(-groups // 8), 16)
    assert values.dtype == dtype
    assert values.shape == ((panels, groups, 2, 16) if dtype == torch.float32 else (panels, groups, 16, 2))
    restored = np.zeros((panels * 16, columns))
    words = indices.numpy()
    for row in range(panels * 16):
        for group in range(8 * words.shape[1]):
            code = int(words[row // 16, group // 8, row % 16]) >> 4 * (group % 8) & 15
            first, second = code & 3, code >> 2
            assert first < second
            if group >= groups or row >= rows:
                assert (first, second) == (0, 1)
            if group >= groups:
                continue
            for slot, column in enumerate((first, second)):
                at = (slot, row % 16) if dtype == torch.float32 else (row % 16, slot)
                restored[row, 4 * group + column] = float(values[row // 16, group, *at])
    np.testing.assert_array_equal(restored[:rows], weight.double().numpy())
    assert not restored[rows:].any()
