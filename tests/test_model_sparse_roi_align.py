import pytest
import torch
from torchvision.ops import roi_align

from model.sparse_roi_align import sparse_roi_align

SHAPE = (2, 3, 9, 14)


def awkward_rois(count: int = 60) -> torch.Tensor:
    """Inside, over every border, far outside, slivers and points; in pixels of a frame of stride 4."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((count, 2), generator=generator) * torch.tensor([70.0, 50.0]) - 10
    size = torch.rand((count, 2), generator=generator) ** 3 * 50
    size[::7] = 0.0
    index = torch.arange(count)[:, None] % SHAPE[0]
    return torch.cat([index, corner, corner + size], dim=1).double()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_values_and_gradients_are_torchvisions(aligned: bool, ratio: int) -> None:
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(SHAPE, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = awkward_rois()
    wanted = roi_align(feature, rois, 5, 0.25, ratio, aligned)
    found = sparse_roi_align(feature, rois, 5, 0.25, ratio, aligned)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    (wanted_grad,) = torch.autograd.grad(wanted, feature, upstream)
    (found_grad,) = torch.autograd.grad(found, feature, upstream)
    torch.testing.assert_close(found_grad, wanted_grad, rtol=0, atol=1e-11)


def test_a_bin_by_hand() -> None:
    """One bin over the cells (0, 0) to (1, 1) of a ramp: its only sample lies in their middle."""
    ramp = torch.arange(12.0).reshape(1, 1, 3, 4).requires_grad_()
    pooled = sparse_roi_align(ramp, torch.tensor([[0.0, 0.5, 0.5, 1.5, 1.5]]), 1, 1.0, 1, True)
    assert pooled.item() == pytest.approx((0 + 1 + 4 + 5) / 4)
    pooled.backward()
    assert ramp.grad is not None
    assert ramp.grad[0, 0].tolist() == [[0.25, 0.25, 0.0, 0.0], [0.25, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_the_gradient_is_the_same_on_every_run() -> None:
    """Resuming promises identical curves, so no sum may depend on who comes first."""
    generator = torch.Generator().manual_seed(2)
    feature = torch.randn(SHAPE, generator=generator, requires_grad=True)
    upstream = torch.randn((60, 3, 5, 5), generator=generator)
    grads = [
        torch.autograd.grad(sparse_roi_align(feature, awkward_rois().float(), 5, 0.25, 2, True), feature, upstream)[0] for _ in range(3)
    ]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
