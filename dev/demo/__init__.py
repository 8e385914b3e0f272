"""Install the product on a cluster and show its main job: `python -m demo install`, `python -m demo run`."""
