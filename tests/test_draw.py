"""DRAW's attention: what any implementation must have, where public code goes wrong, and what is refused."""

import math

import pytest
import torch
from test_cpu_sets import each_set

import hvae_kernels as hk
from hvae_kernels import functional as F
from hvae_kernels.ops.draw import reference

IMPLEMENTATIONS = ("reference", "cpp", "triton")


def numbers(batch=4, **kind):
    return 0.4 * torch.randn(batch, 5, **kind)


def grid(x=0.0, y=0.0, variance=1.0, stride=1.0, gamma=1.0, **kind):
    return torch.tensor([[x, y, math.log(variance), math.log(stride), math.log(gamma)]], **kind)


@pytest.fixture(params=IMPLEMENTATIONS)
def each(request):
    with hk.use_impl(request.param):
        yield request.param


def test_filters_sum_to_one(each):
    attention = torch.cat([numbers(6), 4 * numbers(6)])
    ones = torch.ones(12, 2, 9, 6)
    expected = attention[:, 4].exp()[:, None, None, None].expand(12, 2, 5, 5)
    torch.testing.assert_close(F.draw_read(ones, attention, 5), expected)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_grid_over_the_whole_image_with_narrow_filters_reads_its_pixels(each, size):
    """At stride (A - 1)/(N - 1) and centre (A + 1)/2 the filters lie from pixel 1 to A: none off, none between."""
    step = 2 if size < 6 else 1
    image = torch.randn(1, 1, step * (size - 1) + 1, step * (size - 1) + 1)
    attention = grid(variance=1e-6)
    torch.testing.assert_close(F.draw_read(image, attention, size), image[..., ::step, ::step])
    patch = torch.randn(1, 1, size, size)
    written = torch.zeros_like(image)
    written[..., ::step, ::step] = patch
    torch.testing.assert_close(F.draw_write(patch, attention, image.shape[2:]), written)


def test_width_and_height_are_not_exchanged(each):
    image = torch.zeros(1, 1, 4, 9)
    image[0, 0, 1, 6] = 1.0  # row 2, column 7, counted from 1
    attention = grid(x=2 * 7 / 10 - 1, y=2 * 2 / 5 - 1, variance=1e-4)
    assert F.draw_read(image, attention, 1).item() == pytest.approx(1.0)


def test_writing_is_the_transpose_of_reading_but_for_gamma(each):
    image, patch, attention = torch.randn(4, 2, 8, 5), torch.randn(4, 2, 3, 3), numbers()
    read, written = F.draw_read(image, attention, 3), F.draw_write(patch, attention, (8, 5))
    gamma = attention[:, 4].exp().square()
    torch.testing.assert_close((read * patch).sum((1, 2, 3)), gamma * (image * written).sum((1, 2, 3)))


def test_one_variance_not_its_square(each):
    image, variance = torch.zeros(1, 1, 1, 9), 2.3
    image[..., 4] = 1.0
    weights = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * variance))
    read = F.draw_read(image, grid(variance=variance), 1)
    assert read.item() == pytest.approx((weights[4] / weights.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("place", [0.0, 0.3, -1.4, 40.0])
@pytest.mark.parametrize("variance", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("stride", [0.01, 0.3, 1.0])
def test_near_the_float64_form_wherever_the_grid_lies(each, stride, variance, place):
    """Z underflows in the formula as it is printed; values and gradients stay finite and near."""
    attention = grid(place, -0.7 * place, variance, stride, 0.8).requires_grad_()
    image, patch = torch.rand(1, 1, 28, 28, requires_grad=True), torch.randn(1, 1, 5, 5, requires_grad=True)
    results = {}
    for dtype in (torch.float32, torch.float64):
        exact = dtype is torch.float64
        a, x, p = (tensor.detach().to(dtype).requires_grad_() for tensor in (attention, image, patch))
        function = (reference.draw_read, reference.draw_write) if exact else (F.draw_read, F.draw_write)
        values = function[0](x, a, 5), function[1](p, a, (28, 28))
        gradients = torch.autograd.grad([v.sin().sum() for v in values], (a, x, p))
        results[dtype] = [*values, *gradients]
    # an error of a rounding in a centre moves it by 28 eps, and the exponent by that times distance / variance
    condition = 1 + 28 * 0.5 / variance
    for ours, exact in zip(results[torch.float32], results[torch.float64], strict=True):
        assert ours.isfinite().all()
        scale = exact.abs().max().clamp(min=1.0) * condition
        assert (ours - exact).abs().max() <= 60 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("column", [0, 6])
def test_an_infinite_pixel_is_infinite_for_filters_that_see_it(each, column):
    """Not NaN, which vectors that reach beyond a row's end would make of it."""
    image = torch.rand(1, 1, 5, 7)
    image[0, 0, 2, column] = math.inf
    assert F.draw_read(image, grid(variance=30.0), 3).eq(math.inf).all()


@each_set
@pytest.mark.parametrize("row", [6, 7, 8])
@pytest.mark.parametrize("width", [7, 20])
def test_rows_that_are_not_seen_reach_no_gradient(row, width, cpu_set):
    """Vectors reach into them from rows that are."""
    image, attention = torch.rand(1, 1, 9, width), grid(variance=0.002).requires_grad_()
    patch = torch.ones(1, 1, 1, 1)
    with hk.use_impl("cpp"), hk.use_cpu(cpu_set):
        clean = torch.autograd.grad(F.draw_read(image, attention, 1), attention, patch)
        image[0, 0, row] = math.nan
        torch.testing.assert_close(torch.autograd.grad(F.draw_read(image, attention, 1), attention, patch), clean)


def test_only_what_is_wanted_is_made(monkeypatch):
    from hvae_kernels.ops.draw import autograd

    asked = []
    kernel = autograd.READ_BACKWARD["cpp"]
    monkeypatch.setitem(autograd.READ_BACKWARD, "cpp", lambda *a: asked.append(a[-1]) or kernel(*a))
    image, attention = torch.rand(2, 1, 6, 6), numbers(2)
    with hk.use_impl("cpp"):
        for leaves in ((image,), (attention,), (image, attention)):
            for leaf in (image, attention):
                leaf.requires_grad_(any(leaf is x for x in leaves))
            F.draw_read(image, attention, 2).sum().backward()
    assert asked == [autograd.SOURCE, autograd.ATTENTION, autograd.SOURCE | autograd.ATTENTION]


def test_nothing_of_the_filters_is_saved():
    image, attention = torch.rand(2, 1, 6, 6, requires_grad=True), numbers(2).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), hk.use_impl("cpp"):
        F.draw_read(image, attention, 3)
    assert {x.data_ptr() for x in saved} == {image.data_ptr(), attention.data_ptr()}


def test_vmap_over_one_of_the_two(each):
    images, attention = torch.rand(3, 2, 1, 5, 4), numbers(2)
    mapped = torch.vmap(lambda x: F.draw_read(x, attention, 2))(images)
    torch.testing.assert_close(mapped, torch.stack([F.draw_read(x, attention, 2) for x in images]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.rand(3, 4, 4), numbers(3), 2), ValueError, r"images must be of shape \(B, C, height, width\)"),
        ((torch.rand(3, 1, 0, 4), numbers(3), 2), ValueError, r"images must be .*at least 1"),
        ((torch.rand(3, 1, 4, 4), numbers(2), 2), ValueError, r"attention must be of shape \(3, 5\)"),
        ((torch.rand(3, 1, 4, 4), numbers(3)[:, :4], 2), ValueError, r"attention must be of shape \(3, 5\)"),
        ((torch.rand(3, 1, 4, 4), numbers(3), 0), ValueError, "size must be an integer of at least 1, got int 0"),
        ((torch.rand(3, 1, 4, 4), numbers(3), 2.0), TypeError, "size must be an integer of at least 1"),
        ((torch.rand(3, 1, 4, 4), numbers(3).double(), 2), TypeError, "attention must have the dtype of images"),
    ],
)
def test_refused_reads(arguments, error, message):
    with pytest.raises(error, match=f"draw_read: {message}"):
        F.draw_read(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.rand(3, 1, 4, 3), numbers(3), (8, 8)), ValueError, r"patch must be of shape \(B, C, N, N\)"),
        ((torch.rand(3, 1, 0, 0), numbers(3), (8, 8)), ValueError, r"patch must be of shape \(B, C, N, N\)"),
        ((torch.rand(3, 1, 4, 4), numbers(3), 8), TypeError, r"image_size must be a pair \(height, width\)"),
        ((torch.rand(3, 1, 4, 4), numbers(3), (8, 0)), ValueError, "image_size's width must be an integer"),
        ((torch.rand(3, 1, 4, 4), numbers(2), (8, 8)), ValueError, r"attention must be of shape \(3, 5\)"),
    ],
)
def test_refused_writes(arguments, error, message):
    with pytest.raises(error, match=f"draw_write: {message}"):
        F.draw_write(*arguments)


def test_what_is_not_finite_stays_in_its_sample(each):
    images, attention = torch.rand(3, 1, 6, 6), numbers(3)
    images[0, 0, 2, 2], attention[1, 0] = math.nan, math.nan
    read = F.draw_read(images, attention, 3)
    assert read[0].isnan().any()
    assert read[1].isnan().all()
    assert read[2].isfinite().all()
