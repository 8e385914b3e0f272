"""Ask the local cluster's Prometheus."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request

from cluster.layout import PROMETHEUS_PORT


def query(expression: str) -> dict[str, float]:
    """An instant query's result: series (as JSON of its labels) to value; empty when nothing matches."""
    address = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    return {json.dumps(item["metric"], sort_keys=True): float(item["value"][1]) for item in result}
