"""The contract between the QLoRAJob manifest, the operator and the trainer.

Pydantic only: no Kubernetes client, no torch, no S3. Both siblings import this package; it imports neither.
"""
