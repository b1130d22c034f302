"""nonzero, masked_select and unique with a size, against torch's own on one row at a time."""

import pytest
import torch

import torchlift
from torchlift import TransformError, grad, jacfwd, vmap

SHAPES = [(), (0,), (1,), (7,), (3, 4), (2, 0), (2, 3, 2)]


def padded(values, size, fill):
    """values [n, ...] cut or filled to [size, ...]."""
    missing = values.new_zeros((max(size - len(values), 0), *values.shape[1:])) + fill
    return torch.cat([values, missing])[:size]


def draw(shape, rows=(), dtype=torch.float64):
    return torch.randint(-2, 3, (*rows, *shape)).to(dtype)


def check_nonzero(x, size, fill, found):
    expected = torch.nonzero(x)
    assert torch.equal(found.indices, padded(expected, size, fill)) and found.count == len(expected)
    assert found.indices.dtype == torch.long and found.indices.shape == (size, x.dim())


def check_selection(x, mask, size, fill, found):
    expected = torch.masked_select(x, mask)
    assert torch.equal(found.values, padded(expected, size, fill)) and found.count == len(expected)
    assert found.values.dtype == x.dtype


def check_unique(x, size, found):
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    fill = values.min() if len(values) else 0
    assert torch.equal(found.values, padded(values, size, fill)) and found.count == len(values)
    assert torch.equal(found.counts, padded(counts, size, 0))
    assert torch.equal(found.inverse, inverse)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0, 1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_against_torch(shape, size, dtype):
    x = draw(shape, dtype=dtype)
    check_nonzero(x, size, 7, torchlift.nonzero(x, size, 7))
    mask = draw(shape) > 0
    check_selection(x, mask, size, 1, torchlift.masked_select(x, mask, size, 1))
    check_unique(x, size, torchlift.unique(x, size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0, 1, 5, 20])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_under_vmap(shape, size, batch):
    x = draw(shape, (2, batch)).movedim(1, -1)
    with torchlift.strict():
        over = lambda f: vmap(vmap(f, in_dims=-1))(x)  # noqa: E731
        found = over(lambda x: torchlift.nonzero(x, size))
        selected = over(lambda x: torchlift.masked_select(x, x > 0, size, fill_value=-9))
        uniques = over(lambda x: torchlift.unique(x, size))
        assert selected.values.shape == uniques.values.shape == (2, batch, size)
        for i in range(2):
            for j in range(batch):
                row = x[i][..., j]
                of = lambda result: type(result)(*(t[i, j] for t in result))  # noqa: E731
                check_nonzero(row, size, -1, of(found))
                check_selection(row, row > 0, size, -9, of(selected))
                check_unique(row, size, of(uniques))


def test_only_one_of_two_is_batched():
    x, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.5
    select = lambda x, m: torchlift.masked_select(x, m, 6)  # noqa: E731
    for dims in [(0, None), (None, 0), (0, 0), (1, 1)]:
        a = x[0] if dims[0] is None else x
        b = mask[0] if dims[1] is None else mask
        if dims == (1, 1):
            a, b = x.t(), mask.t()
        found = vmap(select, in_dims=dims)(a, b)
        for i in range(4):
            row_x = x[0] if dims[0] is None else x[i]
            row_mask = mask[0] if dims[1] is None else mask[i]
            check_selection(row_x, row_mask, 6, 0, type(found)(found.values[i], found.count[i]))


def test_gradients():
    x = torch.randn(5, 8, dtype=torch.float64)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    select = lambda x: (torchlift.masked_select(x, x > 0, 4).values.sin() * weights).sum()  # noqa: E731
    expected = torch.zeros_like(x)
    for row, out in zip(x, expected):
        places = torch.nonzero(row > 0)[:4, 0]
        out[places] = row[places].cos() * weights[: len(places)]
    torch.testing.assert_close(vmap(grad(select))(x), expected)
    torch.testing.assert_close(vmap(jacfwd(select))(x), expected)
    torch.testing.assert_close(grad(lambda x: vmap(select)(x).sum())(x), expected)
    distinct = lambda x: (torchlift.unique(x, 9, fill_value=3.0).values ** 2).sum()  # noqa: E731
    torch.testing.assert_close(vmap(grad(distinct))(x), 2 * x)
    repeated = torch.tensor([2.0, 1.0, 2.0, 2.0])
    assert grad(lambda x: torchlift.unique(x, 2).values[1] * 5)(repeated).sum() == 5


def test_broadcasting_and_nan():
    x = torch.arange(3.0)
    found = torchlift.masked_select(x, torch.tensor([[True], [False]]), 6)
    assert found.values.tolist() == [0, 1, 2, 0, 0, 0] and found.count == 3
    nans = torchlift.unique(torch.tensor([float("nan"), 1.0, float("nan")]), 4, fill_value=0)
    assert nans.count == 3 and nans.values.isnan().tolist() == [False, True, True, False]


def test_errors():
    with pytest.raises(TransformError, match=r"\[nonzero\] size is -1, but it is the number"):
        torchlift.nonzero(torch.ones(3), -1)
    with pytest.raises(TransformError, match=r"\[masked_select\] the mask has dtype Float"):
        torchlift.masked_select(torch.ones(3), torch.ones(3), 2)
    with pytest.raises(TransformError, match=r"\[unique\] x must be a tensor, got 3"):
        torchlift.unique(3, 2)
