"""The sample stream is a function of position; Ray Data's part in it is in tests/test_jobs.py."""

import numpy as np
import pytest

from giffy_ray.data.stream import rows_at, slice_of

ROWS = np.asarray([3, 5, 8, 9, 12, 40, 41])


def test_each_epoch_holds_every_row_once():
    dealt = rows_at(np.arange(5 * len(ROWS)), ROWS, seed=1).reshape(5, -1)
    assert all(sorted(epoch) == ROWS.tolist() for epoch in dealt.tolist())
    assert len({tuple(epoch) for epoch in dealt.tolist()}) > 1


def test_a_position_is_the_same_clip_wherever_one_starts():
    positions = np.arange(50)
    whole = rows_at(positions, ROWS, seed=1)
    assert [int(rows_at(np.asarray([p]), ROWS, seed=1)[0]) for p in positions] == whole.tolist()
    assert rows_at(positions, ROWS, seed=2).tolist() != whole.tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_workers_share_a_step_without_gap_or_overlap(workers: int):
    for step in (0, 7):
        shares = [slice_of(step, 6, rank, workers) for rank in range(workers)]
        assert np.concatenate(shares).tolist() == list(range(6 * step, 6 * step + 6))
        assert {len(share) for share in shares} == {6 // workers}
