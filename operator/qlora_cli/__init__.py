"""The `qlora` command: run a manifest without a cluster, or watch one on a cluster."""
