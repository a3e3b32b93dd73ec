"""What the planner predicts of a cluster is near what the cluster serves."""

from __future__ import annotations

import pytest

from helixnet.sim.prediction_check import check

SMALL = 4
"""The seed of a cluster that is simulated in seconds."""


@pytest.mark.slow
def test_a_small_cluster_serves_what_was_predicted() -> None:
    assert check(SMALL).errors() == pytest.approx((0.0, 0.0, 0.0), abs=0.15)
