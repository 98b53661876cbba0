import torch

from model.nms import INVALID_SCORE
from model.ranking import PADDING, take_rows, top_rows


def test_top_rows_pads_where_there_are_fewer() -> None:
    values, rows = top_rows(torch.tensor([[0.2, 0.9], [-7.0, INVALID_SCORE]]), 4)
    torch.testing.assert_close(values, torch.tensor([[0.9, 0.2, PADDING, PADDING], [INVALID_SCORE, -7.0, PADDING, PADDING]]))
    assert rows[0, :2].tolist() == [1, 0]
    assert rows[1, :2].tolist() == [1, 0]
    assert (rows < 2).all(), "padded rows still point at something that exists"


def test_take_rows_of_each_image_and_of_shared_rows() -> None:
    values = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    index = torch.tensor([[2, 0], [1, 1]])
    assert take_rows(values, index).tolist() == [[values[0, 2].tolist(), values[0, 0].tolist()], [values[1, 1].tolist()] * 2]
    shared = torch.arange(3 * 4).reshape(3, 4)
    assert take_rows(shared, index)[1].tolist() == [shared[1].tolist()] * 2
