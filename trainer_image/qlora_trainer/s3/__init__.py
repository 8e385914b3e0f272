"""S3: the only package that touches boto3. The rest of the trainer knows `storage.Storage`."""
