"""What the planner predicts of a cluster is near what the cluster serves."""

from __future__ import annotations

import pytest

from helixnet.sim.prediction_check import check

ROOMY = 3
"""The seed of a cluster of 17 peers with KV room for some 240 requests."""


@pytest.mark.slow
def test_a_cluster_serves_what_was_predicted() -> None:
    assert check(ROOMY).errors() == pytest.approx((0.0, 0.0, 0.0), abs=0.15)
