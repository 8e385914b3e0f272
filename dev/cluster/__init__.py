"""A real one-node Kubernetes on this machine, without Docker: `python -m cluster up|down|status`.

One module per concern. `up` and `teardown` say in which order things happen; everything else is one part of the node.
"""
