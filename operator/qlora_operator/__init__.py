"""The operator: watches QLoRAJobs and makes Jobs of them.

Pure modules (config, gpus, plan, manifests, observed, conditions, reconcile and its helpers) take data and give data.
`api` talks to the API server, `progress` to trainer pods, `controller` carries out what was decided, and `handlers`
wires kopf to them. docs/architecture.md has the map.
"""
