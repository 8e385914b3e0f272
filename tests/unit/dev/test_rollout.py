"""A deployment of the local cluster that doesn't get ready is explained with all that can be learnt of it."""

from pathlib import Path

import pytest

from cluster import kubectl
from cluster.layout import Layout
from cluster.shell import ClusterError

_KUBECTL = """#!/bin/sh
case "$*" in
  *rollout*) echo "timed out waiting" >&2; exit 1 ;;
  *describe*) echo "Back-off pulling image" ;;
  *logs*) echo "no pod has a log yet" >&2; exit 1 ;;
esac
"""


def test_what_can_t_be_learnt_doesn_t_hide_the_rest(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.bin.mkdir(parents=True)
    (layout.bin / "kubectl").write_text(_KUBECTL)
    (layout.bin / "kubectl").chmod(0o755)
    with pytest.raises(ClusterError) as caught:
        kubectl.wait_for_deployment(layout, "dev", "s3")
    for said in ("timed out waiting", "Back-off pulling image", "no pod has a log yet"):
        assert said in str(caught.value)
