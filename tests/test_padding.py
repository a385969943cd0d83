"""Padding: texts of several lengths become one batch, and nothing of any is lost."""

from __future__ import annotations

import pytest
import torch

from growlm.base.padding import pad_left, pad_right

TEXTS = [[5, 6, 7], [8], [0, 9]]  # 0 is a token like others


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_each_row_is_its_text_and_elsewhere_zero(pad):
    ids, real = pad(TEXTS)
    assert ids.dtype == torch.int64
    assert [row[seen].tolist() for row, seen in zip(ids, real, strict=True)] == TEXTS
    assert not ids[~real].any()


def test_the_padding_is_on_the_side_that_the_name_says():
    assert pad_left(TEXTS)[0].tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 9]]
    assert pad_right(TEXTS)[0].tolist() == [[5, 6, 7], [8, 0, 0], [0, 9, 0]]


def test_texts_of_one_length_need_no_mask():
    ids, visible = pad_left([[1, 2], [3, 4]])
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert visible is None
    assert pad_right([[1, 2], [3, 4]])[1].all()
